"""What training computes in another way than MLX: on the CPU attention and gated activations, on a GPU gradients."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlxflow.training.activation import own_swiglu
from mlxflow.training.attention import causal_by_blocks
from mlxflow.training.products import own_products


@contextmanager
def own_arithmetic(*, wanted: bool = True) -> Iterator[None]:
    """Let what is traced in this block compute our way where that serves: see the modules."""
    if not wanted:
        yield
    elif mx.default_device() == mx.cpu:
        with causal_by_blocks(), own_swiglu():
            yield
    else:
        with own_products():
            yield
