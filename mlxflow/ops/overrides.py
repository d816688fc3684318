"""What training computes in another way than MLX: products, on the CPU attention and activations, on a GPU lookups."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops.attention_overrides import Causal, causal_by_blocks, in_fixed_order
from mlxflow.ops.linear_gradients import find_siblings, ordered_lookups, own_products
from mlxflow.ops.swiglu_cpu import own_swiglu


class Arithmetic(NamedTuple):
    """How a step computes.

    Attributes:
        is_own: our way where that serves; else all is MLX's.
        is_deterministic: on a GPU, too, every gradient is added up in one order, so that two runs are equal to the bit.
        attention: a kernel for causal attention in types of 16 bits on CUDA; None for plain operations there.
    """

    is_own: bool = True
    is_deterministic: bool = True
    attention: Causal | None = None


@contextmanager
def own_arithmetic(model: nn.Module, tokens: mx.array, how: Arithmetic) -> Iterator[None]:
    """Let what is traced in this block compute our way where that serves: see the modules.

    Args:
        model: that is traced.
        tokens: (B, L) as it is given them; two of them are looked at.
        how: it computes.
    """
    with ExitStack() as ways:
        if how.is_own:
            on_cpu = mx.default_device() == mx.cpu
            ways.enter_context(own_products([] if on_cpu else find_siblings(model, tokens[:1, :2])))
            if on_cpu:
                ways.enter_context(causal_by_blocks())
                ways.enter_context(own_swiglu())
            elif how.is_deterministic:
                ways.enter_context(ordered_lookups())
                if not mx.metal.is_available():  # there MLX's attention is of plain operations in training
                    ways.enter_context(in_fixed_order(how.attention))
        yield
