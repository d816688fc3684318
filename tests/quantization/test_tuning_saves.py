import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from mlxflow.quantization import tuning_saves
from mlxflow.quantization.tuning_saves import TuningSaves, remove_saves, tuning_progress


def _saves(folder: Path, identity: str = "1", times: Iterator[float] | None = None) -> TuningSaves:
    ticks = times or itertools.repeat(0.0)
    return TuningSaves(folder, identity, task="quantize", total=10, clock=lambda: next(ticks))


def _arrays(number: int) -> dict[str, mx.array]:
    return {"scales.a": mx.array([1 / number])}


def _end(saves: TuningSaves, error: BaseException, *, forgets: bool = False) -> None:
    """Take three steps, and end with an error."""
    with saves.saving_on_signals():
        saves.note(3, lambda: _arrays(3))
        if forgets:
            saves.forget()
        raise error


def test_a_state_is_saved_by_time_and_less_often_if_that_takes_long(tmp_path: Path) -> None:
    # begin; step 1; step 2 and its save of 10 s, so that the next one is due after 20 times as long; steps 3 and 4
    times = iter([0.0, 59.0, 61.0, 61.0, 71.0, 270.0, 272.0, 272.0, 273.0])
    saves = _saves(tmp_path, times=times)
    found = []
    for number in range(1, 5):
        saves.note(number, partial(_arrays, number), [0.5] * number)
        found.append(tuning_progress(tmp_path))
    assert found == [(0, 0), (2, 10), (2, 10), (4, 10)]
    begun = _saves(tmp_path).begun
    assert begun is not None
    assert (begun.number, begun.losses) == (4, [0.5] * 4)
    assert mx.array_equal(begun.arrays["scales.a"], _arrays(4)["scales.a"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_signal_saves_the_last_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: type[BaseException]
) -> None:
    saves = _saves(tmp_path)
    with pytest.raises(error):
        _end(saves, error())
    assert _saves(tmp_path).first == 3
    assert capsys.readouterr().err == (
        "quantize: stopped after step 3 of 10 of the tuning; the next run resumes from there\n"
        "quantize: resumes from step 3 of 10 of the tuning\n"
    )


def test_a_state_that_is_about_to_change_is_not_saved(tmp_path: Path) -> None:
    saves = _saves(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        _end(saves, KeyboardInterrupt(), forgets=True)
    assert _saves(tmp_path).begun is None


def test_an_error_saves_nothing_and_neither_does_the_end(tmp_path: Path) -> None:
    saves = _saves(tmp_path)
    with pytest.raises(ValueError, match="one"):
        _end(saves, ValueError("one"))
    with saves.saving_on_signals():
        saves.note(4, lambda: _arrays(4))
    assert _saves(tmp_path).begun is None


def test_the_state_of_other_settings_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_saves, "_SECONDS", 0.0)
    _saves(tmp_path).note(3, lambda: _arrays(3))
    assert _saves(tmp_path, "2").begun is None
    assert _saves(tmp_path, "1").first == 3
    remove_saves(tmp_path)
    assert _saves(tmp_path, "1").begun is None


def test_without_a_folder_nothing_is_saved() -> None:
    saves = TuningSaves(None, "", task="quantize", total=10)
    with pytest.raises(KeyboardInterrupt):
        _end(saves, KeyboardInterrupt())
    assert saves.first == 0
