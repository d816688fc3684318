"""A model that is asked something as it evaluates, without dropout, and trains on as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode until the block ends; each layer that was in training then is again.

    Args:
        model: whose layers may be in different modes.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module._training = True
