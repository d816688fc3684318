"""`mx.gather_mm` in 16-bit types on the CPU, where MLX supports fp32 only.

`mx.gather_mm` multiplies each row by the matrix of its expert in a mixture of experts. On the CPU backend it raises in
bf16 and fp16; here it is computed in fp32 and rounded once, which is at least as exact. MLX derives the gradients.
"""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxflow.ops import patching

_HALF = (mx.bfloat16, mx.float16)


def install() -> None:
    """Make `mx.gather_mm` accept 16-bit types on the CPU, in this process; other calls are passed on to MLX.

    mlx-lm's layers look the function up at each call, so existing models use the replacement, too.
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
    """Return the dtype of a product of two dtypes, by MLX's promotion."""
    if first == second:
        return first
    return (mx.zeros((), first) + mx.zeros((), second)).dtype
