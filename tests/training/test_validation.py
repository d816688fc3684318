from pathlib import Path

import mlx.core as mx
import pytest

from tests.training.small_training import (
    checkpoint_store,
    records_of,
    train_small,
)


@pytest.mark.parametrize(("eval_every", "expected"), [(0, [0, 6]), (2, [0, 2, 4, 6]), (6, [0, 6])])
def test_validation_runs_first_last_and_every_eval_every_steps(eval_every: int, expected: list[int]) -> None:
    result, records, _ = train_small(eval_every=eval_every)
    measured = records_of(records, "validation")
    assert [record["step"] for record in measured] == expected
    assert result.first_validation_loss == measured[0]["loss"]
    assert result.last_validation_loss == measured[-1]["loss"]


def test_patience_ends_training_and_keeps_the_best_weights(tmp_path: Path) -> None:
    def rate(step: mx.array) -> mx.array:
        return mx.where(step < 4, 1e-2, 0.5)  # it learns, then it is thrown off

    best, records, weights = train_small(
        store=checkpoint_store(tmp_path), learning_rate=rate, num_steps=30, eval_every=1, patience=2, keep="best"
    )
    losses = {record["step"]: record["loss"] for record in records_of(records, "validation")}
    lowest = min(losses, key=lambda step: losses[step])
    assert best.best_step == lowest
    assert best.steps == lowest + 2 < 30
    _, _, until_then = train_small(learning_rate=rate, num_steps=lowest, eval_every=1)
    assert weights == until_then
