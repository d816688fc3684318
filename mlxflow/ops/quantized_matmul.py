"""`mx.quantized_matmul` of many rows on the CPU: the weight is dequantized and multiplied by the BLAS.

MLX multiplies with packed codes on the CPU at about 3 GFLOP/s, and in 16-bit types at a tenth of that, however many
rows there are. For more than a few rows it is faster to write the dense weight, in fp32, and to multiply with that: 17
times for 512 rows in fp32, 80 times in bf16 (`python benchmarks/quantized_matmul.py`). Sums are in fp32 and rounded
once, which is at least as exact.

The dense weight lives for one product: the gradient of the rows writes it once more, after the incoming gradient is
known, so that a training step never holds the dense model.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlxflow.ops import patching

# Rows from which a dense product is faster, for each type of the rows
_MIN_ROWS = {mx.float32: 16, mx.bfloat16: 2, mx.float16: 2}

_Matmul = Callable[..., mx.array]


def install() -> None:
    """Replace `mx.quantized_matmul` of many rows on the CPU, in this process; other calls are passed on to MLX.

    MLX's layers look the function up at each call, so existing models use the replacement, too.
    """
    patching.install(mx, "quantized_matmul", _by_rows(mx.quantized_matmul), by=__name__)


def uninstall() -> None:
    """Undo `install`."""
    patching.uninstall(mx, "quantized_matmul", by=__name__)


def _by_rows(plain: _Matmul) -> _Matmul:
    @functools.wraps(plain)
    def quantized_matmul(
        x: mx.array,
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        transpose: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        **named: Any,
    ) -> mx.array:
        if named or not _is_faster_dense(x, w):
            return plain(x, w, scales, biases, transpose, group_size, bits, mode, **named)
        multiply = _dense_product(transpose, group_size, bits, mode, str(x.dtype))
        return multiply(x, w, scales, *([] if biases is None else [biases]))

    return quantized_matmul


def _is_faster_dense(x: mx.array, w: mx.array) -> bool:
    rows = math.prod(x.shape[:-1])
    return mx.default_device() == mx.cpu and w.ndim == 2 and x.ndim > 1 and rows >= _MIN_ROWS.get(x.dtype, math.inf)


@functools.cache
def _dense_product(transpose: bool, group_size: int | None, bits: int | None, mode: str, rows_dtype: str) -> _Matmul:
    """Return a differentiable product of rows, (..., D), with a quantized weight, (N, D) or, not transposed, (D, N)."""

    def weight(codes: mx.array, scales: mx.array, *biases: mx.array) -> mx.array:
        if biases and rows_dtype == str(mx.float32):  # MLX casts 16-bit scales to the dtype of the rows, too
            scales, biases = scales.astype(mx.float32), (biases[0].astype(mx.float32),)
        dense = mx.dequantize(codes, scales, biases[0] if biases else None, group_size, bits, mode)
        return dense.astype(mx.float32)

    def product(x: mx.array, dense: mx.array, *, transposed: bool) -> mx.array:
        return (x.astype(mx.float32) @ (dense.T if transposed else dense)).astype(x.dtype)

    @mx.custom_function
    def multiply(x: mx.array, codes: mx.array, *scales: mx.array) -> mx.array:
        return product(x, weight(codes, *scales), transposed=transpose)

    @multiply.vjp
    def gradients(primals: tuple[mx.array, ...], incoming: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, codes, *scales = primals
        # otherwise mx.compile would keep the dense weight of the forward pass for this product
        later = mx.depends([codes], [incoming])[0]
        dx = product(incoming, weight(later, *scales), transposed=not transpose)

        def of_scales(*scales: mx.array) -> mx.array:
            return product(x, weight(codes, *scales), transposed=transpose)

        # lazy, and not computed for frozen layers; MLX has no gradient of the scales of other modes
        for_scales = mx.vjp(of_scales, scales, [incoming])[1] if mode == "affine" else map(mx.zeros_like, scales)
        return dx, mx.zeros_like(codes), *for_scales

    return cast("_Matmul", multiply)
