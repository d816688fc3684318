"""Embedding lookup with a deterministic gradient.

On a GPU MLX accumulates the gradients of a row that was looked up more than once with atomics, in no fixed order: two
runs differ in the last bit. Here the incoming gradients are sorted by row number and summed by a segmented scan
(Blelloch 1990, "Prefix sums and their applications", section 1.5), in the same order every time.
"""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlxflow.ops.custom_function import custom_function


def lookup(
    table: mx.array, numbers: mx.array, gradient: Callable[[mx.array, mx.array, int], mx.array] | None = None
) -> mx.array:
    """Return `table[numbers]`.

    Args:
        table: (V, D); the result is differentiable with respect to it.
        numbers: (...) row numbers from 0 to V - 1.
        gradient: takes the numbers, (N,), the incoming gradient, (N, D), and V; returns the table's gradient, (V, D),
            in the dtype of the incoming one. None for `ordered_gradient`.

    Returns:
        (..., D)
    """
    rows = numbers.reshape(-1)

    @custom_function
    def taken(table: mx.array, rows: mx.array) -> mx.array:
        return table[rows]

    @taken.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        table, rows = primals
        return (gradient or ordered_gradient)(rows, cotangent, len(table)), mx.zeros_like(rows)

    return cast("mx.array", taken(table, rows)).reshape(*numbers.shape, table.shape[1])


def ordered_gradient(numbers: mx.array, incoming: mx.array, count: int) -> mx.array:
    """Return the sum of the incoming gradients of each row, (V, D), accumulated in fp32 in a fixed order.

    Args:
        numbers: (N,) row numbers from 0 to V - 1.
        incoming: (N, D) gradients.
        count: rows of the table, V.
    """
    ordered, order = by_number(numbers, count)
    sums = incoming[order].astype(mx.float32)
    length, step = len(ordered), 1
    while step < length:  # after a pass each row holds the sum of up to 2 * step rows of its number, ending with itself
        is_same = (ordered[step:] == ordered[:-step])[:, None]
        sums = mx.concatenate([sums[:step], sums[step:] + mx.where(is_same, sums[:-step], 0)])
        step *= 2
    is_last = mx.concatenate([ordered[1:] != ordered[:-1], mx.array([True])])
    at = mx.where(is_last, ordered, count)  # the others go to an extra row, which is cut off
    whole = mx.zeros((count + 1, incoming.shape[1]), incoming.dtype)
    whole[at] = sums.astype(incoming.dtype)
    return whole[:count]


def by_number(numbers: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Return numbers, (N,), in ascending order, and the place of each before; a stable sort."""
    length = len(numbers)
    wide = mx.uint32 if count * length < 2**32 else mx.int64
    keys = mx.sort(numbers.astype(wide) * length + mx.arange(length, dtype=wide))
    return (keys // length).astype(mx.int32), (keys % length).astype(mx.int32)
