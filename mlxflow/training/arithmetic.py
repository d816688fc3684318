"""What training computes in another way than MLX: products, on the CPU attention and activations, on a GPU lookups."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx

from mlxflow.training.activation import own_swiglu
from mlxflow.training.attention import causal_by_blocks
from mlxflow.training.products import ordered_lookups, own_products


@contextmanager
def own_arithmetic(*, wanted: bool = True) -> Iterator[None]:
    """Let what is traced in this block compute our way where that serves: see the modules."""
    with ExitStack() as ways:
        if wanted:
            ways.enter_context(own_products())
            on_cpu = mx.default_device() == mx.cpu
            for way in (causal_by_blocks, own_swiglu) if on_cpu else (ordered_lookups,):
                ways.enter_context(way())
        yield
