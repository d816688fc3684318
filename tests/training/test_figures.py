"""The figures of a training run in its report."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from mlxflow.training.figures import TrainingFigures, TrainingRun


def _result() -> Any:
    losses = {"first_validation_loss": 3.0, "last_validation_loss": 2.0, "best_validation_loss": 1.0, "best_step": 4}
    seconds = {"seconds": 2.0, "compile_seconds": 0.5, "data_wait_seconds": 0.25, "device_wait_seconds": 0.125}
    counts = {
        "steps": 8,
        "rows": 24,
        "tokens": 64,
        "skipped_steps": 1,
        "tokens_per_second": 32.0,
        "peak_memory_bytes": 1024,
    }
    return SimpleNamespace(rank_waited_seconds=(), memory_limit_bytes=4096, **losses, **seconds, **counts)


@pytest.mark.parametrize(("keeps_best", "loss"), [(True, 1.0), (False, 2.0)])
def test_the_trained_perplexity_is_that_of_the_kept_weights(keeps_best: bool, loss: float) -> None:
    assert TrainingFigures.of(_result(), num_rows=16, keeps_best=keeps_best) == TrainingFigures(
        steps=8,
        epochs=1.5,
        tokens=64,
        skipped_steps=1,
        first_validation_perplexity=math.exp(3.0),
        trained_validation_perplexity=math.exp(loss),
        best_validation_perplexity=math.exp(1.0),
        best_validation_step=4,
    )


def test_a_kernel_that_is_not_in_use_is_listed_with_its_reason() -> None:
    kernels: Any = SimpleNamespace(refused={"adamw": "slower"})
    assert TrainingRun.of(_result(), kernels) == TrainingRun(
        tokens_per_second=32.0,
        training_seconds=2.0,
        compile_seconds=0.5,
        data_wait_seconds=0.25,
        device_wait_seconds=0.125,
        training_peak_memory_bytes=1024,
        training_memory_limit_bytes=4096,
        kernels_refused=("adamw: slower",),
    )
