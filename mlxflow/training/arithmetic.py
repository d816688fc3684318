"""What training computes in another way than MLX: products, on the CPU attention and activations, on a GPU lookups."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlxflow.training.activation import own_swiglu
from mlxflow.training.attention import causal_by_blocks
from mlxflow.training.products import find_siblings, ordered_lookups, own_products


@contextmanager
def own_arithmetic(model: nn.Module, tokens: mx.array, *, wanted: bool = True) -> Iterator[None]:
    """Let what is traced in this block compute our way where that serves: see the modules.

    Args:
        model: that is traced.
        tokens: (B, L) as it is given them; two of them are looked at.
        wanted: False for MLX's own ways.
    """
    with ExitStack() as ways:
        if wanted:
            on_cpu = mx.default_device() == mx.cpu
            ways.enter_context(own_products([] if on_cpu else find_siblings(model, tokens[:1, :2])))
            for way in (causal_by_blocks, own_swiglu) if on_cpu else (ordered_lookups,):
                ways.enter_context(way())
        yield
