"""Rows of a table by their numbers, with a gradient that is summed in a fixed order.

On a GPU MLX adds the gradients of a row that was looked up more than once by atomics, in the order in which they
happen to come: two runs differ in the last bit. Here the looked-up rows are sorted, and those of one number added up by
a segmented scan (Blelloch 1990, "Prefix sums and their applications", section 1.5): plain operations, the same
every time.
"""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx


def lookup(
    table: mx.array, numbers: mx.array, gradient: Callable[[mx.array, mx.array, int], mx.array] | None = None
) -> mx.array:
    """Return `table[numbers]`.

    Args:
        table: (V, D), of which the result is differentiable.
        numbers: (...) from 0 to V - 1.
        gradient: takes the numbers, (N,), what comes in, (N, D), and V; returns (V, D) in the type of what comes in.
            None for `ordered_gradient`.

    Returns:
        (..., D)
    """
    rows = numbers.reshape(-1)

    @mx.custom_function
    def taken(table: mx.array, rows: mx.array) -> mx.array:
        return table[rows]

    @taken.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        table, rows = primals
        return (gradient or ordered_gradient)(rows, cotangent, len(table)), mx.zeros_like(rows)

    return cast("mx.array", taken(table, rows)).reshape(*numbers.shape, table.shape[1])


def ordered_gradient(numbers: mx.array, incoming: mx.array, count: int) -> mx.array:
    """Return the sum of the rows that came in for each number, (V, D), added up in fp32 in a fixed order.

    Args:
        numbers: (N,) from 0 to V - 1.
        incoming: (N, D).
        count: V.
    """
    found, order = by_number(numbers, count)
    sums = incoming[order].astype(mx.float32)
    length, step = len(found), 1
    while step < length:  # afterwards each row holds the sum of up to 2 * step rows of its number, itself the last
        is_same = (found[step:] == found[:-step])[:, None]
        sums = mx.concatenate([sums[:step], sums[step:] + mx.where(is_same, sums[:-step], 0)])
        step *= 2
    is_last = mx.concatenate([found[1:] != found[:-1], mx.array([True])])
    at = mx.where(is_last, found, count)  # the others to a row that is cut off
    whole = mx.zeros((count + 1, incoming.shape[1]), incoming.dtype)
    whole[at] = sums.astype(incoming.dtype)
    return whole[:count]


def by_number(numbers: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Return numbers, (N,), in rising order, and where each was; of equal ones the first comes first."""
    length = len(numbers)
    wide = mx.uint32 if count * length < 2**32 else mx.int64
    keys = mx.sort(numbers.astype(wide) * length + mx.arange(length, dtype=wide))
    return (keys // length).astype(mx.int32), (keys % length).astype(mx.int32)
