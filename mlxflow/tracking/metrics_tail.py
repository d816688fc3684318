"""Read a `metrics.jsonl` while it is written: whole lines only, also after it was written again from its beginning."""

import os
from pathlib import Path
from typing import BinaryIO

from mlxflow.tracking.tracked_run import CurvePoint, points_of

# Read at once: a long run's file is handed over in pieces, so that a slow tracker shows progress
_MAX_BYTES = 1 << 18


class MetricsTail:
    """The points of a metrics file, each once, in its order.

    A run that resumes writes steps again that were read already; a tracker may have points of an earlier process. A
    point is left out if a later or the same step of its name was read, or is known.

    Args:
        paths: the files that may hold the metrics; the first one that exists is read.
        known: the last step that the tracker has of each name; of names that are missing, `known_of_all`.
        known_of_all: the last step that the tracker has of every name; -1 for none.
    """

    def __init__(self, paths: tuple[str, ...], known: dict[str, int], known_of_all: int = -1) -> None:
        self._paths = [Path(path) for path in paths]
        self._last = dict(known)
        self._known_of_all = known_of_all
        self._file: BinaryIO | None = None
        self._held = b""

    def read(self, only: int | None = None) -> list[CurvePoint] | None:
        """Return the next points, which may be none of many lines; None if there is nothing to read now.

        Args:
            only: number of the only path to open; None for any.
        """
        if self._file is None or self._was_replaced():
            self._open(only)
        data = self._file.read(_MAX_BYTES) if self._file else b""
        if not data:
            return None
        *lines, self._held = (self._held + data).split(b"\n")
        return [point for line in lines for point in points_of(line) if self._is_new(point)]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, only: int | None) -> None:
        paths = self._paths if only is None else self._paths[only : only + 1]
        for path in paths:
            try:
                file = path.open("rb")
            except OSError:
                continue
            self.close()
            self._file, self._held = file, b""
            return

    def _was_replaced(self) -> bool:
        """Return whether the open file became shorter, or another one has its name; one that was only moved has not."""
        if self._file is None:
            return True
        own = os.fstat(self._file.fileno())
        if own.st_size < self._file.tell():
            return True
        try:
            there = self._paths[0].stat()
        except OSError:
            return False
        return (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino) and own.st_size == self._file.tell()

    def _is_new(self, point: CurvePoint) -> bool:
        if point.step <= self._last.get(point.name, self._known_of_all):
            return False
        self._last[point.name] = point.step
        return True
