"""`mx.quantized_matmul` of many rows: the weight is dequantized and multiplied as a dense one.

MLX multiplies with packed codes on the CPU at about 3 GFLOP/s, and in 16-bit types at a tenth of that, however many
rows there are. For more than a few rows it is faster to write the dense weight, in fp32, and to multiply with that: 17
times for 512 rows in fp32, 80 times in bf16 (`python benchmarks/cpu.py`). Sums are in fp32 and rounded once, which is
at least as exact. On a GPU the kernel verification decides for each shape (`mlxflow/kernels/quantized_product.py`).

The dense weight lives for one product, and that of a large weight, such as an output head's, in slices: the gradient of
the rows writes it once more, after the incoming gradient is known, so that a training step never holds the dense model.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlxflow.ops import patching
from mlxflow.ops.custom_function import custom_function

# Rows from which a dense product is faster on the CPU, for each type of the rows
_MIN_ROWS = {mx.float32: 16, mx.bfloat16: 2, mx.float16: 2}

#: Rows of a weight that are dequantized at a time.
SLICE_ROWS = 16_384

# Widths of codes that never lie in two words
_BITS_OF_WHOLE_WORDS = (2, 4, 8)

_Matmul = Callable[..., mx.array]


class Format(NamedTuple):
    """How a weight is quantized; the arguments of `mx.dequantize`."""

    group_size: int | None
    bits: int | None
    mode: str


#: Returns whether the product of x, (..., D), with codes is faster through a dense weight: of rows, codes, transpose
#: and format.
IsFasterDense = Callable[[mx.array, mx.array, bool, Format], bool]


def install() -> None:
    """Replace `mx.quantized_matmul` of many rows on the CPU, in this process; other calls are passed on to MLX.

    MLX's layers look the function up at each call, so existing models use the replacement, too.
    """
    patching.install(mx, "quantized_matmul", _replacing(mx.quantized_matmul, is_faster_on_cpu), by=__name__)


def uninstall() -> None:
    """Undo `install`."""
    patching.uninstall(mx, "quantized_matmul", by=__name__)


@contextmanager
def replaced(is_faster_dense: IsFasterDense) -> Iterator[None]:
    """Replace `mx.quantized_matmul` in what is traced until the block ends.

    Args:
        is_faster_dense: decides for each product; others are passed on.
    """
    with patching.attributes((mx, "quantized_matmul", _replacing(mx.quantized_matmul, is_faster_dense)), by=__name__):
        yield


def _replacing(plain: _Matmul, is_faster_dense: IsFasterDense) -> _Matmul:
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
        form = Format(group_size, bits, mode)
        if named or w.ndim != 2 or x.ndim < 2 or not is_faster_dense(x, w, transpose, form):
            return plain(x, w, scales, biases, transpose, group_size, bits, mode, **named)
        return dense_product(x, (w, scales, *([] if biases is None else [biases])), form, transpose=transpose)

    return quantized_matmul


def is_faster_on_cpu(x: mx.array, w: mx.array, transpose: bool, form: Format) -> bool:
    """Return whether a dense product is faster than MLX's on the CPU; False on other devices."""
    return mx.default_device() == mx.cpu and math.prod(x.shape[:-1]) >= _MIN_ROWS.get(x.dtype, math.inf)


def dense_product(x: mx.array, weight: tuple[mx.array, ...], form: Format, *, transpose: bool) -> mx.array:
    """Return the product of rows with a quantized weight, through its dense copy; differentiable.

    Args:
        x: (..., D).
        weight: codes of (N, D) numbers, or of (D, N) if it is not transposed; scales; biases if the mode has them.
        form: of the weight.
        transpose: as `mx.quantized_matmul` has it.
    """
    return _dense_product(transpose, form, str(x.dtype))(x, *weight)


def multiply(
    x: mx.array, weight: tuple[mx.array, ...], form: Format, *, transpose: bool, plus: mx.array | None = None
) -> mx.array:
    """Return what `dense_product` does, slice by slice of a large weight; without a gradient.

    A slice is dequantized after `x` is known and after the slice before was used.

    Args:
        x: see `dense_product`.
        weight: see there.
        form: see there.
        transpose: see there.
        plus: added to the result; None for nothing.
    """
    slices = [tuple(part[begin : begin + SLICE_ROWS] for part in weight) for begin in _slice_begins(weight[0])]
    total = None if plus is None else _widened(plus)
    if transpose:
        parts: list[mx.array] = []
        for part in slices:
            dense = _dense(part, form, x.dtype, after=parts[-1] if parts else x)
            parts.append(_widened(x) @ dense.T)
        product = mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return (product if total is None else total + product).astype(x.dtype)
    for begin, part in zip(_slice_begins(weight[0]), slices, strict=True):
        rows = _widened(x[..., begin : begin + SLICE_ROWS] if len(slices) > 1 else x)
        dense = _dense(part, form, x.dtype, after=x if total is None else total)
        total = rows @ dense if total is None else mx.addmm(total, rows, dense)
    return cast("mx.array", total).astype(x.dtype)


def dequantize(weight: tuple[mx.array, ...], form: Format) -> mx.array:
    """Return what `mx.dequantize` does, to the bit; on the CPU in one operation within a compiled function.

    There MLX writes the codes of each place in a word by themselves, joins them and scales them: twice the memory of
    the result, and 1.7 to 2.5 times as long.

    Args:
        weight: codes of (..., N) numbers; scales; biases if the mode has them.
        form: of the weight.
    """
    codes, scales, *biases = weight
    size, bits = form.group_size, form.bits
    if mx.default_device() != mx.cpu or form.mode != "affine" or size is None or bits not in _BITS_OF_WHOLE_WORDS:
        return mx.dequantize(codes, scales, biases[0] if biases else None, size, bits, form.mode)
    words = codes.reshape(*scales.shape, size * bits // 32, 1)
    numbers = (words >> mx.arange(0, 32, bits, dtype=mx.uint32)) & mx.array((1 << bits) - 1, mx.uint32)
    scales, offsets = scales[..., None, None], biases[0][..., None, None]
    return (numbers.astype(scales.dtype) * scales + offsets).reshape(*codes.shape[:-1], -1)


def widened(weight: tuple[mx.array, ...], dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """Return a quantized weight whose 16-bit scales and biases are fp32 if rows are, as MLX casts them in a product.

    Args:
        weight: codes; scales; biases if the mode has them.
        dtype: of the rows.
    """
    codes, *scales = weight
    if len(scales) == 2 and dtype == mx.float32:
        return codes, *(one.astype(mx.float32) for one in scales)
    return weight


def _slice_begins(codes: mx.array) -> range:
    return range(0, len(codes), SLICE_ROWS)


def _widened(x: mx.array) -> mx.array:
    """Return rows as they are multiplied: in fp32 on the CPU, where MLX's 16-bit products are slow."""
    return x.astype(mx.float32) if mx.default_device() == mx.cpu else x


def _dense(weight: tuple[mx.array, ...], form: Format, dtype: mx.Dtype, *, after: mx.array) -> mx.array:
    """Return a dense weight that is written after another array is known.

    Without that order MLX may write those of many layers first, and `mx.compile` would keep the one of the forward pass
    for the gradient.
    """
    codes, *scales = weight
    dense = dequantize(widened((mx.depends([codes], [after])[0], *scales), dtype), form)
    return dense.astype(mx.float32 if mx.default_device() == mx.cpu else dtype)


@functools.cache
def _dense_product(transpose: bool, form: Format, _: str) -> _Matmul:
    """Return a differentiable product of rows, (..., D), with a quantized weight."""

    @custom_function
    def product(x: mx.array, *weight: mx.array) -> mx.array:
        return multiply(x, weight, form, transpose=transpose)

    @product.vjp
    def gradients(primals: tuple[mx.array, ...], incoming: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, codes, *scales = primals
        dx = multiply(incoming, (codes, *scales), form, transpose=not transpose)

        def of_scales(*scales: mx.array) -> mx.array:
            return multiply(x, (codes, *scales), form, transpose=transpose)

        # lazy, and not computed for frozen layers; MLX has no gradient of the scales of other modes
        is_affine = form.mode == "affine"
        for_scales = mx.vjp(of_scales, scales, [incoming])[1] if is_affine else map(mx.zeros_like, scales)
        return dx, mx.zeros_like(codes), *for_scales

    return cast("_Matmul", product)
