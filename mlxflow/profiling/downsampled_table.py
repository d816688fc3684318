"""A table of fixed size that halves its resolution when full, so that a profiler's memory does not grow."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Columns:
    """Numbers by row and column. When the table is full, every second row is dropped, and of later rows, too.

    A run of any length is covered with ever fewer points. In the columns `most` a dropped row's value is merged into
    the next row by the maximum, so that peaks survive.

    Args:
        names: of the columns.
        capacity: largest number of rows; even.
        most: names of the columns that keep maxima.
    """

    def __init__(self, names: Sequence[str], *, capacity: int, most: Sequence[str]) -> None:
        self._names = list(names)
        self._table = np.full((capacity, len(self._names)), 0.0)  # written, so that the pages are allocated
        self._most = [self._names.index(name) for name in most]
        self._count = 0
        self._every = 1
        self._pending = np.zeros(len(self._names))
        self._skipped = 0

    def __len__(self) -> int:
        return self._count

    def append(self, row: Sequence[float]) -> None:
        """Add a row at the end."""
        pending = self._pending
        before = pending[self._most] if self._skipped else None
        pending[:] = row
        if before is not None:
            pending[self._most] = np.maximum(before, pending[self._most])
        self._skipped += 1
        if self._skipped < self._every:
            return
        self._skipped = 0
        self._table[self._count] = pending
        self._count += 1
        if self._count == len(self._table):
            self._thin()

    def _thin(self) -> None:
        kept = self._table[1::2]
        for column in self._most:
            kept[:, column] = np.maximum(self._table[::2, column], kept[:, column])
        self._table[: len(kept)] = kept.copy()
        self._count = len(kept)
        self._every *= 2

    def column(self, name: str) -> "NDArray[np.float64]":
        """Return a copy of one column."""
        return self._table[: self._count, self._names.index(name)].copy()

    def arrays(self, *, fractions: Sequence[str]) -> dict[str, "NDArray[np.generic]"]:
        """Return the columns by name, as int64.

        Args:
            fractions: names of the columns that are returned as fp32.
        """
        return {name: self.column(name).astype(np.float32 if name in fractions else np.int64) for name in self._names}
