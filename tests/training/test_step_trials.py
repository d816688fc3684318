from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.kernels import model_kernels
from mlxflow.training import build
from mlxflow.training.memory_threshold import first_threshold
from mlxflow.training.settings import TrainingSettings
from mlxflow.training.step import Step
from mlxflow.training.step_trials import part_of, try_step
from tests.small_models import llama
from tests.training.step_peaks import peak_of_steps

LENGTH = 64


def _rows() -> Rows:
    tokens = np.random.default_rng(0).integers(0, 64, (8, LENGTH + 1)).astype(np.int32)
    return Rows(tokens, np.full(tokens.shape, 3, np.uint8))


def test_a_part_of_the_rows_has_about_a_share_of_the_tokens() -> None:
    rows = _rows()
    assert part_of(rows, 4).tokens.shape == (2, LENGTH + 1)
    assert part_of(rows.head(2), 4).tokens.shape == (1, LENGTH // 2 + 1)
    assert part_of(rows.head(1), 4).tokens.shape == (1, LENGTH // 4 + 1)


def test_the_peak_of_a_trial_grows_with_the_tokens() -> None:
    model, _ = llama(vocab_size=64, hidden_size=32, num_layers=2, seed=0)
    settings = TrainingSettings(batch_size=8, warmup_steps=0)
    build.prepare_model(model, settings, adapter_seed=0)
    subject = build.Subject(model, settings, 64, LENGTH)
    trials = [try_step(subject, model_kernels.no_kernels(), rows) for rows in (_rows(), part_of(_rows(), 4))]
    (whole, part) = (trial for trial in trials if trial is not None)
    assert (whole.tokens, part.tokens) == (8 * LENGTH, 2 * LENGTH)
    assert part.peak_bytes < whole.peak_bytes
    assert min(whole.seconds, part.seconds) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_a_trial_is_that_of_steps_beside_the_weights_that_it_restores(precision: str) -> None:
    model, _ = llama(vocab_size=2048, hidden_size=192, intermediate_size=512, num_layers=2, num_heads=6, seed=0)
    settings = TrainingSettings(batch_size=8, warmup_steps=0, precision=precision)  # type: ignore[arg-type]
    build.prepare_model(model, settings, adapter_seed=0)
    subject, rows = build.Subject(model, settings, 2048, LENGTH), _rows()
    trial = try_step(subject, model_kernels.no_kernels(), rows)
    assert trial is not None
    peak = peak_of_steps(subject, model_kernels.no_kernels(), rows, count=4)
    assert trial.peak_bytes - trial.replaced_bytes == pytest.approx(peak, rel=0.03)
    assert trial.replaced_bytes > 0.035 * peak


def test_a_longer_trial_takes_no_more_steps_than_the_training_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llama(vocab_size=64, hidden_size=32, num_layers=2, seed=0)
    settings = TrainingSettings(batch_size=8, warmup_steps=0, num_steps=12)
    build.prepare_model(model, settings, adapter_seed=0)
    update, taken = Step.update, list[int]()

    def counted(self: Step, gradients: Any) -> Any:
        taken.append(1)
        return update(self, gradients)

    monkeypatch.setattr(Step, "update", counted)
    subject = build.Subject(model, settings, 64, LENGTH)
    counts = []
    for seconds in (0.0, 3600.0):
        taken.clear()
        assert try_step(subject, model_kernels.no_kernels(), _rows(), least_seconds=seconds)
        counts.append(len(taken))
    assert counts == [2 + 5, 2 + 15]  # two alone, and groups of five


def test_a_trial_is_taken_with_the_threshold_that_a_training_begins_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    compute = Step.compute

    def looking(self: Step, *arrays: mx.array) -> Any:
        seen.append(mx.get_memory_limit())
        return compute(self, *arrays)

    monkeypatch.setattr(Step, "compute", looking)
    allowed = mx.get_memory_limit()
    model, _ = llama(vocab_size=64, hidden_size=32, num_layers=2, seed=0)
    settings = TrainingSettings(batch_size=8, warmup_steps=0)
    build.prepare_model(model, settings, adapter_seed=0)
    assert try_step(build.Subject(model, settings, 64, LENGTH), model_kernels.no_kernels(), _rows())
    assert set(seen) == {first_threshold(allowed)}
    assert mx.get_memory_limit() == allowed
