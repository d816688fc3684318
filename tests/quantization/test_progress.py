import pytest

from mlxflow.messages import terminal
from mlxflow.quantization.progress import show_layers


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
