from typing import cast

import pytest

from mlxflow.data.token_file import Rows
from mlxflow.messages import terminal
from mlxflow.quantization import progress
from mlxflow.quantization.progress import show_layers, watched_rows


def test_no_bar_is_drawn_into_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with show_layers("packing", 2) as done:
        done("layers.0")
        done("layers.1")
    assert "layers" not in "".join(capsys.readouterr())


def test_a_bar_names_the_last_layer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = terminal.console
    monkeypatch.setattr(terminal, "console", lambda *, stderr: plain(stderr=stderr, force_terminal=True))
    with show_layers("packing", 2) as done:
        done("layers.0")
        done("layers.1")
    printed = "".join(capsys.readouterr())
    assert "2/2" in printed
    assert "layers.1" in printed


class _Rows:
    num_rows = 40

    def batch(self, begin: int, end: int) -> tuple[int, int]:
        return begin, end


def test_rows_are_read_through_and_their_progress_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = terminal.console
    monkeypatch.setattr(terminal, "console", lambda *, stderr: plain(stderr=stderr, force_terminal=True, width=100))
    with watched_rows("quantize:q4", "measuring", cast("Rows", _Rows())) as rows:
        assert (rows.num_rows, rows.batch(0, 16), rows.batch(16, 40)) == (40, (0, 16), (16, 40))
    printed = capsys.readouterr().err
    assert "quantize:q4" in printed
    assert "16/40" in printed
    assert "measuring" in printed


def test_a_log_gets_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 0.0, 9.0, 20.0, 25.0])
    lines = progress._ProgressLines("quantize: measuring", 400, "rows", lambda: next(times))
    for done in (0, 80, 160, 240):
        lines.show(done)
    assert capsys.readouterr().err == "quantize: measuring, 160 of 400 rows, 30 s left\n"
