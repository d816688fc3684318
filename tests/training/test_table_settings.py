"""The training settings of a `[train]` table: every `auto` is a number."""

import pytest

from mlxflow.stages import train
from mlxflow.training import table_settings


@pytest.mark.parametrize(("num_steps", "warmup", "decay"), [(1, 0, 1), (30, 15, 6), (240, 20, 48)])
def test_warm_up_and_decay_follow_from_the_steps(num_steps: int, warmup: int, decay: int) -> None:
    settings = table_settings.training_settings(train.Config(num_epochs=2), num_steps)
    assert (settings.num_steps, settings.warmup_steps, settings.decay_steps) == (num_steps, warmup, decay)


def test_written_values_are_kept() -> None:
    config = train.Config(batch_size=100, warmup_steps=3, decay_steps=4, weight_decay=0.5)
    settings = table_settings.training_settings(config, 50)
    assert (settings.warmup_steps, settings.decay_steps, settings.max_batch_size) == (3, 4, 100)
    assert settings.weight_decay == 0.5
