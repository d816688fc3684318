"""Switch a model to eval mode and restore each submodule's mode afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode until the block ends, then restore the mode of each submodule.

    Args:
        model: its submodules may be in different modes.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module._training = True
