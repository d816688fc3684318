"""The product of mixtures of experts on the CPU in 16-bit types, which MLX has there in fp32 alone.

`mx.gather_mm` multiplies each row by the matrix of its expert. On the CPU backend it raises in bf16 and fp16; there it
is computed in fp32 and rounded once, which is at least as exact. Gradients follow by MLX's own rules.
"""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxflow.ops import patching

_HALF = (mx.bfloat16, mx.float16)


def install() -> None:
    """Let `mx.gather_mm` take 16-bit types on the CPU, in this process; what MLX computes itself stays as it is.

    mlx-lm's layers look the function up at each call, so models that exist already get it, too.
    """
    patching.install(mx, "gather_mm", _widened(mx.gather_mm), by=__name__)


def uninstall() -> None:
    """Undo `install`."""
    patching.uninstall(mx, "gather_mm", by=__name__)


def _widened(plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    @functools.wraps(plain)
    def gather_mm(a: mx.array, b: mx.array, *indices: Any, **named: Any) -> mx.array:
        if mx.default_device() != mx.cpu or (a.dtype not in _HALF and b.dtype not in _HALF):
            return plain(a, b, *indices, **named)
        product = plain(a.astype(mx.float32), b.astype(mx.float32), *indices, **named)
        return product.astype(_common_type(a.dtype, b.dtype))

    return gather_mm


def _common_type(first: mx.Dtype, second: mx.Dtype) -> mx.Dtype:
    """Return the type that MLX gives a product of two types."""
    if first == second:
        return first
    return (mx.zeros((), first) + mx.zeros((), second)).dtype
