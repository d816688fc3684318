"""Epochs as steps, and the words for the length of a training."""

import pytest

from mlxflow.stages import train
from mlxflow.training.length import describe_length, epochs_of, steps_of


@pytest.mark.parametrize(
    ("epochs", "rows", "per_step", "steps"),
    [(1, 8, 4, 2), (1, 9, 4, 3), (3, 1, 4, 1), (0.1, 8, 4, 1), (2.5, 8, 4, 5), (0.3, 10, 1, 3), (1e9, 10**6, 1, 10**9)],
)
def test_steps_cover_every_row_of_the_epochs(epochs: float, rows: int, per_step: int, steps: int) -> None:
    assert steps_of(epochs, num_rows=rows, rows_per_step=per_step) == steps


def test_epochs_of_steps() -> None:
    assert epochs_of(6, num_rows=8, rows_per_step=4) == 3.0


@pytest.mark.parametrize(
    ("config", "num_rows", "line"),
    [
        (train.Config(num_epochs=3, batch_size=4), 66, "3 epochs of 66 rows: 50 steps of 4 rows"),
        (train.Config(num_epochs=3, batch_size=4), None, "3 epochs of the corpus"),
        (
            train.Config(num_steps=240, batch_size=16, grad_accum_steps=2),
            1000,
            "7.68 epochs of 1,000 rows: 240 steps of 32 rows",
        ),
        (train.Config(), None, "240 steps"),
    ],
)
def test_the_length_of_a_training_is_described(config: train.Config, num_rows: int | None, line: str) -> None:
    assert describe_length(config, num_rows) == line
