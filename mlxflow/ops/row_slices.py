"""Operations on large matrices in slices of rows: MLX allocates all temporary results of a matrix before it frees any.

The slices are lazy. MLX runs a few operations ahead of those that are finished, so the temporary results of a few
slices exist at a time, instead of those of the whole matrix.
"""

import math
from collections.abc import Callable

import mlx.core as mx

# Numbers of a matrix from which it is computed in slices; and of a slice
_LARGE, _SLICE = 1 << 24, 1 << 20


def slices_of(matrix: mx.array, numbers: int) -> list[mx.array]:
    """Return a matrix, (..., N), as lazy slices of its rows, (R, N), with about so many numbers each."""
    rows = matrix.reshape(-1, matrix.shape[-1])
    step = max(1, numbers // matrix.shape[-1])
    return [rows[begin : begin + step] for begin in range(0, len(rows), step)]


def by_rows(change: Callable[..., mx.array], *matrices: mx.array, width: int) -> mx.array:
    """Return what a function of matrices gives, in slices if that is large.

    Args:
        change: of arrays, (R, ...); returns (R, N), each row computed from the same row of the others.
        matrices: (..., M) each, with equal leading axes.
        width: N.
    """
    shape = matrices[0].shape[:-1]
    count = math.prod(shape)
    if count * width <= _LARGE:
        return change(*matrices)
    rows = [matrix.reshape(count, -1) for matrix in matrices]
    step = max(1, _SLICE // width)
    parts = [change(*(one[begin : begin + step] for one in rows)) for begin in range(0, count, step)]
    return mx.concatenate(parts).reshape(*shape, -1)


def dequantized(
    codes: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    """Return what `mx.dequantize` does, to the bit; of large matrices on the CPU in slices.

    There MLX composes it of several operations, with temporary results of five times the size of the result.
    """
    if mx.default_device() != mx.cpu:
        return mx.dequantize(codes, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=dtype)

    def change(codes: mx.array, scales: mx.array, *biases: mx.array) -> mx.array:
        offsets = biases[0] if biases else None
        return mx.dequantize(codes, scales, offsets, group_size=group_size, bits=bits, mode=mode, dtype=dtype)

    width = 32 * codes.shape[-1] // bits
    return by_rows(change, codes, scales, *([] if biases is None else [biases]), width=width)
