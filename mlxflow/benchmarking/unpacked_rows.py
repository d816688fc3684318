"""Unpacked rows, one piece of a document in each, padded: the rows of training without packing."""

from collections.abc import Iterator

import numpy as np

from mlxflow.data.loader import DeviceBatch, Order
from mlxflow.data.token_file import Batch, Rows

# The most rows that are read to decide whether documents share rows
_LOOKED_AT = 4096


def holds_several(rows: Rows) -> bool:
    """Return whether some row of a sample, spread over the file, holds more than one document."""
    every = max(1, rows.num_rows // _LOOKED_AT)  # rows filled by one document may all come first
    return bool((np.asarray(rows.marks[::every]) >> 1).max(initial=0) > 1)


def apart(rows: Rows, *, count: int, seed: int) -> Rows:
    """Return rows with one piece each, padded at the end, from packed rows drawn at random without repetition.

    Args:
        rows: (R, L + 1), packed.
        count: number of rows to return; fewer if there are not enough pieces with targets.
        seed: of the draw.
    """
    tokens: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    for row in np.random.default_rng(seed).permutation(rows.num_rows).tolist():
        numbers = np.asarray(rows.marks[row]) >> 1
        for number in range(1, int(numbers.max(initial=0)) + 1):
            places = np.flatnonzero(numbers == number)
            if not (np.asarray(rows.marks[row])[places[1:]] & 1).any():
                continue  # no target
            tokens.append(_padded(np.asarray(rows.tokens[row])[places], rows.tokens.shape[1]))
            alone = np.asarray(rows.marks[row])[places] & 1 | 2  # the first piece of its row
            marks.append(_padded(alone, rows.marks.shape[1]))
        if len(tokens) >= count:
            break
    return Rows(np.stack(tokens[:count]), np.stack(marks[:count]))


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([values, np.zeros(length - len(values), values.dtype)])


def trimmed(batch: Batch) -> Batch:
    """Return a batch without the columns in which no row has a token."""
    width = max(2, int(np.flatnonzero(batch.marks.any(axis=0)).max(initial=1)) + 1)
    return Batch(batch.tokens[:, :width], batch.marks[:, :width])


class InlineLoader(Iterator[DeviceBatch]):
    """Endless batches without prefetching, in the same order as `data.loader.Loader`.

    Args:
        rows: the rows to take batches from.
        batch_size: rows in a batch, B.
        seed: of the order.
        trims: cut each batch to its longest row, whatever its width.
    """

    def __init__(self, rows: Rows, *, batch_size: int, seed: int, trims: bool) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._order = Order(rows.num_rows, seed=seed)
        self._trims = trims
        self._cursor = 0

    def __next__(self) -> DeviceBatch:
        """Return the next batch."""
        batch = self._rows.take(self._order.rows(self._cursor, self._batch_size))
        self._cursor += self._batch_size
        if self._trims:
            batch = trimmed(batch)
        return DeviceBatch.of(batch)
