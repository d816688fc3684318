import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.kernels import model_kernels
from mlxflow.training import forecast, job, kernel_selection
from mlxflow.training.forecast import Forecast, Seconds, _at, _peak, num_validations
from mlxflow.training.memory_forecast import MemoryForecast
from mlxflow.training.settings import SettingNames, TrainingSettings
from mlxflow.training.step_trials import StepTrial, _num_ahead


def test_a_pass_is_linear_in_its_tokens_and_never_below_a_trial() -> None:
    assert _at(400, 100, 10.0, 200, 15.0) == pytest.approx(25.0)
    assert _at(400, 100, 10.0, 200, 9.0) == 9.0
    assert _at(400, 100, 10.0, 100, 10.0) == pytest.approx(40.0)


def test_the_peak_of_the_update_does_not_grow_with_the_tokens() -> None:
    few, many = StepTrial(100, 90, 30, 1.0, 0.1), StepTrial(200, 90, 40, 2.0, 0.1)
    assert _peak(few, many, 400) == 90
    assert _peak(few, many, 4000) == pytest.approx(420)


def test_the_weights_of_before_a_trial_are_no_part_of_the_peak_of_a_training() -> None:
    trial = StepTrial(100, 90, 30, 1.0, 0.1, replaced_bytes=20)
    assert _peak(trial, trial, 100) == 70


def test_seconds_to_the_end_count_start_compilation_every_validation_and_what_is_written() -> None:
    seconds = Seconds(
        start=3, opening=5, choosing=1, first_step=2, step=0.5, steps=60, validation=4, validations=3, writing=7
    )
    assert seconds.total == 3 + 2 * 5 + 1 + 2 + 30 + 12 + 7


@pytest.mark.parametrize(
    ("of_row", "measured", "seconds"),
    [(2.0, [2, 2], 64.0), (0.5, [2, 2, 4, 8], 16.0), (0.01, [2, 2, 4, 8, 16, 32], 0.32)],
)
def test_fast_validations_are_measured_with_more_rows(
    of_row: float, measured: list[int], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, sizes, now = Rows(np.zeros((32, 5), np.int32), np.full((32, 5), 3, np.uint8)), list[int](), [0.0]

    def measure(_model: Any, some: Rows, **_: Any) -> None:
        sizes.append(some.num_rows)
        now[0] += of_row * some.num_rows + (100.0 if len(sizes) == 1 else 0.0)  # the first one is compiled

    monkeypatch.setattr(forecast, "measure_perplexity", measure)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    subject: Any = _Stand(settings=TrainingSettings(batch_size=2, warmup_steps=0), model=None)
    assert forecast._validation_seconds(subject, model_kernels.no_kernels(), rows) == pytest.approx(seconds)
    assert sizes == measured


@pytest.mark.parametrize(
    ("steps", "every", "validations"), [(60, 0, 2), (60, 100, 2), (60, 60, 2), (60, 20, 4), (61, 20, 5), (1, 1, 2)]
)
def test_validations_are_counted_as_the_trainer_makes_them(steps: int, every: int, validations: int) -> None:
    settings = TrainingSettings(num_steps=steps, eval_every=every, warmup_steps=0)
    made = 1 + sum(step == steps or (every > 0 and step % every == 0) for step in range(1, steps + 1))
    assert num_validations(settings) == made == validations


def test_slow_steps_are_tried_less_often() -> None:
    assert [_num_ahead(4, seconds) for seconds in (0.01, 5.0, 60.0)] == [5, 4, 2]
    assert _num_ahead(1, 0.01) == 2


class _Stand:
    """Stands in for a job, tokens and a context."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def _replace(self, **_: Any) -> "_Stand":
        return self


def _foreseen(
    monkeypatch: pytest.MonkeyPatch,
    settings: TrainingSettings,
    rows: Rows,
    try_step: Callable[..., StepTrial],
    forecast_memory: Callable[..., MemoryForecast],
) -> Callable[..., Forecast]:
    """Return a function of the seconds before that forecasts a training whose steps and memory are given."""
    subject = _Stand(settings=settings, model=None, names=SettingNames("train"))
    monkeypatch.setattr(job, "prepare", lambda *_, on_open: (on_open(), subject, None))
    monkeypatch.setattr(kernel_selection, "select_kernels", lambda *_: None)
    monkeypatch.setattr(forecast, "remembered_forecast", forecast_memory)
    monkeypatch.setattr(forecast, "try_step", try_step)
    monkeypatch.setattr(forecast, "_validation_seconds", lambda *_: 5.0)
    monkeypatch.setattr(forecast, "_writing_seconds", lambda *_: 7.0)
    request: Any = _Stand(picks_checkpointing=False, kernels=_Stand())
    context: Any = _Stand(memory_limit_bytes=1000)
    tokens: Any = _Stand(rows=rows)

    def made(before_seconds: float = 0.0) -> Forecast:
        return forecast.forecast(request, tokens, rows, context, before_seconds=before_seconds)

    return made


@pytest.mark.parametrize(
    ("traced", "of_validation", "tried", "step", "peak"),
    [
        (900, 100, [8], 7.0, 800),  # measured
        (900, 850, [8], 7.0, 850),
        (1100, 100, [2, 4], 6.0, 1100),
        (None, 0, [2, 4], 6.0, 400),
    ],
)
def test_all_rows_are_timed_where_they_fit_and_parts_where_not(
    traced: int | None, of_validation: int, tried: list[int], step: float, peak: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainingSettings(num_steps=10, batch_size=8, warmup_steps=0, grad_accum_steps=2, eval_every=4)
    rows, trials = Rows(np.zeros((16, 5), np.int32), np.full((16, 5), 3, np.uint8)), []

    def try_step(_subject: Any, _kernels: Any, some: Rows, least_seconds: float = 0.0) -> StepTrial:
        trials.append(some.num_rows)
        assert (least_seconds == 10.0) == (some.num_rows == 8)
        seconds = {8: 3.0, 4: 1.5, 2: 1.0}[some.num_rows]  # of parts a line gives 2.5 for all rows
        return StepTrial(4 * some.num_rows, 100 * some.num_rows, 50, seconds, 1.0, first_seconds=2.0)

    def forecast_memory(*_: Any) -> MemoryForecast:
        if traced is None:
            raise ValueError("an operation that cannot be exported")
        return MemoryForecast(traced, 32, of_validation)

    foreseen = _foreseen(monkeypatch, settings, rows, try_step, forecast_memory)
    expected = foreseen(100.0)
    assert trials == tried
    assert expected.peak_bytes == peak
    assert expected.advice == (
        'Lower train.batch_size or context_length, set train.checkpointing = "layers" and train.fused_loss = true, or '
        "raise memory_limit_bytes."
    )
    seconds = expected.seconds
    assert seconds.step == pytest.approx(step)
    assert (seconds.steps, seconds.first_step) == (10, 2.0)
    assert seconds.start == 100.0
    assert 0 <= seconds.opening < 10 > seconds.choosing >= 0
    assert seconds.writing == 7.0
    assert (seconds.validation, seconds.validations) == (5.0, 5)  # steps 0, 4, 8 and 10, and the written model


def test_the_time_of_a_pass_is_that_of_the_positions_that_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial computes padding, and took 3 s; the passes of the training compute a third of the positions."""
    settings = TrainingSettings(num_steps=10, batch_size=8, warmup_steps=0, grad_accum_steps=2)
    marks = np.zeros((16, 97), np.uint8)
    marks[:, :20] = 3
    rows = Rows(np.zeros(marks.shape, np.int32), marks)

    def try_step(_subject: Any, _kernels: Any, some: Rows, least_seconds: float = 0.0) -> StepTrial:
        return StepTrial(96 * some.num_rows, 100, 50, 3.0, 1.0)

    foreseen = _foreseen(monkeypatch, settings, rows, try_step, lambda *_: MemoryForecast(900, 8 * 96))
    assert foreseen().seconds.step == pytest.approx(2 * 3.0 / 3 + 1.0)


def test_what_a_trial_compiles_is_not_counted_for_the_training_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainingSettings(num_steps=10, batch_size=8, warmup_steps=0)
    rows = Rows(np.zeros((16, 5), np.int32), np.full((16, 5), 3, np.uint8))
    compiled, trials = [7], list[int]()

    def try_step(_subject: Any, _kernels: Any, some: Rows, least_seconds: float = 0.0) -> StepTrial:
        trials.append(some.num_rows)
        compiled[0] += 3 if len(trials) == 1 and compiles else 0
        return StepTrial(4 * some.num_rows, 100, 50, 3.0, 1.0, first_seconds=60.0 if len(trials) == 1 else 2.0)

    monkeypatch.setattr(forecast, "_num_compiled", lambda: compiled[0])
    foreseen = _foreseen(monkeypatch, settings, rows, try_step, lambda *_: MemoryForecast(900, 32))
    first = []
    for compiles in (True, False):
        trials.clear()
        first.append(foreseen().seconds.first_step)
        assert trials == ([8, 8] if compiles else [8])
    assert first == [2.0, 60.0]


def test_a_prediction_that_the_training_will_read_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, clock, made = Rows(np.zeros((16, 5), np.int32), np.full((16, 5), 3, np.uint8)), [0.0], [50.0, 0.5]

    def predict(*_: Any) -> MemoryForecast:
        clock[0] += made.pop(0)
        return MemoryForecast(900, 32)

    def try_step(_subject: Any, _kernels: Any, some: Rows, **_: Any) -> StepTrial:
        return StepTrial(4 * some.num_rows, 100, 50, 3.0, 1.0, first_seconds=2.0)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    foreseen = _foreseen(monkeypatch, TrainingSettings(batch_size=8, warmup_steps=0), rows, try_step, predict)
    assert foreseen().seconds.choosing == 0.5
    assert not made
