"""What the CPU computes in training in another way than MLX: attention and gated activations."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlxflow.training.activation import own_swiglu
from mlxflow.training.attention import causal_by_blocks


@contextmanager
def own_arithmetic(*, wanted: bool = True) -> Iterator[None]:
    """Let what is traced in this block compute our way where that serves: see both modules."""
    if not wanted:
        yield
        return
    with causal_by_blocks(), own_swiglu():
        yield
