"""The rows that a method learns from: chosen at random, and joined to full rows where they end in padding.

A method that fits the inputs of layers would fit those of padding, which no one reads.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from mlxflow.data.token_file import Batch, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Rows whose padding is counted at a time
_COUNTED_ROWS = 1024


def choose_text(rows: Rows, *, count: int, skips: int = 0, seed: int) -> Batch:
    """Return rows without padding, (R, L + 1), or one shorter row if the text does not fill one.

    Args:
        rows: of the token file.
        count: of rows; fewer are returned if there is less text.
        skips: rows of the same order that are left out; the first ones are returned if none are left.
        seed: of the choice.
    """
    order = np.random.default_rng(seed).permutation(rows.num_rows)
    first = order[: 4 * (skips + count)]
    is_full = np.asarray(rows.marks[first] != 0).all(axis=1)
    if is_full.sum() >= skips + count:
        return rows.take(first[is_full][skips : skips + count])
    joined = _joined(rows.take(_enough(rows, order, (skips + count) * rows.tokens.shape[1])))
    begin = skips if len(joined.tokens) > skips else 0
    return Batch(joined.tokens[begin : begin + count], joined.marks[begin : begin + count])


def _enough(rows: Rows, order: "NDArray[np.int64]", num_tokens: int) -> "NDArray[np.int64]":
    """Return the first rows of an order that have so many tokens without padding; all of them if they have fewer."""
    found = 0
    for begin in range(0, len(order), _COUNTED_ROWS):
        some = order[begin : begin + _COUNTED_ROWS]
        sums = found + np.cumsum(np.count_nonzero(rows.marks[some], axis=1))
        if sums[-1] >= num_tokens:
            return order[: begin + int(np.searchsorted(sums, num_tokens)) + 1]
        found = int(sums[-1])
    return order


def _joined(batch: Batch) -> Batch:
    """Return rows whose tokens follow each other without padding; what does not fill the last one is left out."""
    width = batch.tokens.shape[1]
    is_text = batch.marks != 0
    tokens, marks = batch.tokens[is_text], batch.marks[is_text].astype(np.int64)
    pieces = np.cumsum(_are_first(is_text, batch.marks))
    count, width = (len(tokens) // width, width) if len(tokens) >= width else (1, len(tokens))
    tokens, marks, pieces = (one[: count * width].reshape(count, width) for one in (tokens, marks, pieces))
    numbered = 2 * (1 + pieces - pieces[:, :1]) + (marks & 1)
    return Batch(tokens, numbered.astype(np.min_scalar_type(int(numbered.max(initial=0)))))


def _are_first(is_text: "NDArray[np.bool_]", marks: "NDArray[Any]") -> "NDArray[np.bool_]":
    """Return for each token that is no padding, in the order of rows, whether a piece of a document begins with it."""
    changes = np.ones(marks.shape, bool)
    changes[:, 1:] = marks[:, 1:] >> 1 != marks[:, :-1] >> 1
    return changes[is_text]
