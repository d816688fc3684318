from typing import get_args

import pytest

from mlxflow.training.optimizer_options import WITH_BETAS, WITHOUT_DECAY, Optimizer
from mlxflow.training.optimizers import options_of


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_optimizer_options_match_the_arguments_of_mlx(name: str) -> None:
    options = options_of(name)
    assert ("betas" in options) == (name in WITH_BETAS)
    assert ("weight_decay" not in options) == (name in WITHOUT_DECAY)
