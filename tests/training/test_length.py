"""Epochs as steps, and the words for the length of a training."""

import pytest

from mlxflow.models.new_model import ModelConfig
from mlxflow.stages import quantize, train
from mlxflow.training.length import describe_length, epochs_of, fitted, steps_of


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
        (train.Config(num_epochs=1, batch_size=4), None, "1 epoch of the corpus"),
        (train.Config(num_epochs=1, batch_size=1), 1, "1 epoch of 1 row: 1 step of 1 row"),
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


@pytest.mark.parametrize(
    ("config", "num_rows", "batch_size"),
    [
        (train.Config(), 7, 7),
        (train.Config(), 32, 32),
        (train.Config(model=ModelConfig(from_="folder")), 3, 3),
        (train.Config(batch_size=16), 7, 16),
        (quantize.Config(method="qat"), 7, 7),
        (quantize.Config(method="qat", batch_size=16), 7, 16),
    ],
)
def test_a_default_batch_is_all_rows_if_there_are_fewer(
    config: train.Config | quantize.Config, num_rows: int, batch_size: int
) -> None:
    assert fitted(config, num_rows, key="train.batch_size").batch_size == batch_size


def test_a_smaller_batch_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(train.Config(), 7, key="train:a.batch_size")
    said = "train:a.batch_size: 7 instead of 32, the default: the training text fills 7 rows\n"
    assert capsys.readouterr().err == said


def test_the_plan_counts_epochs_by_the_smaller_batch() -> None:
    config = train.Config(num_epochs=2, grad_accum_steps=2)
    assert describe_length(config, 7) == "2 epochs of 7 rows: 1 step of 14 rows"
