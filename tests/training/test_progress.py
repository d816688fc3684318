import io
from typing import Any

import pytest

from mlxflow.messages import terminal
from mlxflow.training import progress
from mlxflow.training.progress import duration, show_progress, steps_to

TRAIN = {
    "kind": "train",
    "step": 10,
    "loss": 2.3456,
    "learning_rate": 1e-3,
    "tokens_per_second": 12345.6,
    "peak_memory_bytes": 1.5e9,
}
VALIDATION = {"kind": "validation", "step": 0, "loss": 7.11849, "perplexity": 1234.56}
BATCH = {"kind": "batch_size", "step": 7, "batch_size": 16}


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (TRAIN, "train: step 10 of 20  loss 2.346  learning rate 1.0e-03  12,346 tokens/s  1.50 GB"),
        (TRAIN | {"loss": None}, "train: step 10 of 20  loss -  learning rate 1.0e-03  12,346 tokens/s  1.50 GB"),
        (VALIDATION, "train: step 0 of 20  held-out loss 7.118 (perplexity 1,234.6)"),
        (BATCH, "train: step 7 of 20  batch 16"),
    ],
)
def test_a_record_is_one_line_where_there_is_no_terminal(
    record: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress("train", num_steps=20) as log:
        log(record)
    assert tuple(capsys.readouterr()) == ("", f"{line}\n")


def test_the_time_left_follows_from_the_steps_of_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([100.0, 104.0])
    lines = progress._StepLines("train:base", 130, lambda: next(times))
    lines.show(VALIDATION | {"step": 20})  # a run that was resumed
    lines.show(TRAIN | {"step": 30})
    assert capsys.readouterr().err.splitlines()[1].endswith("1.50 GB  40 s left")


@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_shows_a_bar_and_the_last_figures(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    plain = terminal.console
    monkeypatch.setattr(
        terminal, "console", lambda *, stderr: plain(stderr=stderr, force_terminal=True, width=width, file=shown)
    )
    with show_progress("train:base", num_steps=20) as log:
        for record in (VALIDATION, BATCH, TRAIN):
            log(record)
    text = shown.getvalue()
    assert "train:base" in text
    assert "10/20" in text
    assert "  loss 2.346  held-out loss 7.118 (perplexity 1,234.6)" in text
    assert "  learning rate 1.0e-03  12,346 tokens/s  1.50 GB  batch 16" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (3600 * 2 + 301, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_steps_without_a_record_advance_the_bar_and_print_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_progress("train", num_steps=20) as log:
        steps_to(log)(3)
    assert capsys.readouterr().err == ""
    plain = terminal.console
    monkeypatch.setattr(terminal, "console", lambda *, stderr: plain(stderr=stderr, force_terminal=True, width=80))
    with show_progress("train", num_steps=20) as log:
        log(BATCH)
        steps_to(log)(9)
    assert "9/20" in capsys.readouterr().err
