"""Rows of a fixed length from a file of tokens, in an order known from the seed and the epoch alone."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rows(tokens: "NDArray[Any]", *, context_length: int) -> "NDArray[Any]":
    """View a token sequence as rows of inputs and their targets, without a copy.

    Row r holds `context_length + 1` tokens; its last token is the first of row r + 1, so that every token but the
    very first is a target once. A tail shorter than a row is left out.

    Args:
        tokens: (T,)
        context_length: positions the model sees, L.

    Returns:
        (R, L + 1), R = (T - 1) // L.
    """
    count = max(0, (len(tokens) - 1) // context_length)
    stride = tokens.strides[0]
    return np.lib.stride_tricks.as_strided(
        tokens, (count, context_length + 1), (context_length * stride, stride), writeable=False
    )


def batches(table: "NDArray[Any]", *, batch_size: int, seed: int) -> Iterator["NDArray[Any]"]:
    """Yield batches of rows without end: each epoch visits every row once, in a new order, drop-last.

    Args:
        table: (R, L + 1), memory-mapped or not; R is at least `batch_size`.
        batch_size: rows a batch, B.
        seed: the order of epoch e is a permutation by (seed, e).

    Yields:
        (B, L + 1) in the type of the table; a copy.
    """
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(table))
        for begin in range(0, len(order) - batch_size + 1, batch_size):
            yield table[order[begin : begin + batch_size]]
        epoch += 1
