import time

import pytest

from mlxflow.data.progress import show_progress, show_waiting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: found[0])
    return found


def _printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return "".join(capsys.readouterr()).splitlines()


def test_without_a_terminal_there_is_a_line_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress("tokenizing", 40_000_000) as (progress, watch):
        progress.count(read_bytes=10_000_000)
        for seconds in (1.0, 10.0, 15.0):
            clock[0] = seconds
            watch()
        assert _printed(capsys) == ["tokenizing  10 MB  30 s left"]
        clock[0] = 20.0
        watch()
        assert _printed(capsys) == ["tokenizing  10 MB  60 s left"]


def test_work_done_at_once_prints_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("tokenizing", 1):
        clock[0] = 0.2
    assert _printed(capsys) == []


def test_a_long_wait_is_reported_once(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with show_waiting("training a tokenizer") as watch:
        watch()
        assert _printed(capsys) == []
        clock[0] = 5.5
        watch()
        watch()
    assert _printed(capsys) == ["training a tokenizer"]
