"""Which MLX operations are replaced in a training step: products, attention, SwiGLU and embedding lookups."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import adapter_products, quantized_matmul
from mlxflow.ops.attention_overrides import Causal, causal_by_blocks, in_fixed_order, long_rows_by_blocks
from mlxflow.ops.linear_gradients import find_siblings, ordered_lookups, replaced_products
from mlxflow.ops.swiglu_cpu import replaced_swiglu


class OperationOverrides(NamedTuple):
    """Which operations of a step are replaced.

    Attributes:
        is_enabled: replace them; False leaves everything to MLX.
        is_deterministic: on a GPU, too, gradients are accumulated in a fixed order: two runs are equal to the bit.
        attention: a kernel for causal 16-bit attention on CUDA; None for plain operations there.
        keeps_mlx_attention: on Metal, MLX's attention gives the same gradients twice, to the bit; else plain
            operations take its place.
        is_faster_dense: on a GPU, which products with quantized weights take a dense copy; None for none.
    """

    is_enabled: bool = True
    is_deterministic: bool = True
    attention: Causal | None = None
    keeps_mlx_attention: bool = False
    is_faster_dense: quantized_matmul.IsFasterDense | None = None


@contextmanager
def replaced_operations(model: nn.Module, tokens: mx.array, how: OperationOverrides) -> Iterator[None]:
    """Replace MLX operations in what is traced until the block ends.

    On the CPU: products, causal attention and SwiGLU. On a GPU: products, and for deterministic gradients embedding
    lookups and attention. Each module documents the supported arguments; other calls go to MLX.

    Args:
        model: the model that is traced.
        tokens: (B, L) ids; two of them are used to find layers that read the same array.
        how: which operations.
    """
    with ExitStack() as replaced:
        if how.is_enabled:
            on_cpu = mx.default_device() == mx.cpu
            is_faster_dense = quantized_matmul.is_faster_on_cpu if on_cpu else how.is_faster_dense or _never
            if not on_cpu:
                replaced.enter_context(quantized_matmul.replaced(is_faster_dense))
            replaced.enter_context(
                adapter_products.replaced_adapters(adapter_products.find_groups(model, tokens[:1, :2]), is_faster_dense)
            )
            replaced.enter_context(replaced_products([] if on_cpu else find_siblings(model, tokens[:1, :2])))
            if on_cpu:
                replaced.enter_context(causal_by_blocks())
                replaced.enter_context(replaced_swiglu())
            elif how.is_deterministic:
                replaced.enter_context(ordered_lookups())
                if how.keeps_mlx_attention:
                    replaced.enter_context(long_rows_by_blocks())
                else:
                    replaced.enter_context(in_fixed_order(how.attention, only_16_bits=not mx.metal.is_available()))
            else:
                replaced.enter_context(long_rows_by_blocks())
        yield


@contextmanager
def replaced_in_evaluation(how: OperationOverrides) -> Iterator[None]:
    """Let products with quantized weights take the way of a training step until the block ends.

    On a GPU only: on the CPU they do wherever a model is used (`quantized_matmul.install`).
    """
    if how.is_faster_dense is None:
        yield
        return
    with quantized_matmul.replaced(how.is_faster_dense):
        yield


def _never(*_: Any) -> bool:
    return False
