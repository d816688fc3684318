"""What the CPU computes in training in another way than MLX: attention and gated activations."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from mlxflow.training.activation import own_swiglu
from mlxflow.training.attention import causal_by_blocks


@contextmanager
def own_arithmetic(*, wanted: bool = True) -> Iterator[None]:
    """Let what is traced in this block compute our way where that serves, on the CPU alone: see both modules."""
    if not wanted or mx.default_device() != mx.cpu:
        yield
        return
    with causal_by_blocks(), own_swiglu():
        yield
