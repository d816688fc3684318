"""The journal of a profiler's readings and phases, written during the run; a kill loses at most the last second.

Each line is a JSON list whose first item is the kind:

    ["columns", "seconds", ...]                        the first line: names of the numbers of a reading
    ["step", 3, 0.51, ...]                             end of a step: its number and the reading
    ["sample", 0.55, ...]                              a reading of the sampling thread
    ["enter", "training_step/update", 0.49]            begin of a phase, in seconds
    ["phase", "training_step/update", 0.49, 0.51, 900] end of a phase: begin and end in seconds, peak in bytes
    ["end"]                                            the profiler was closed; missing after a kill

The file is locked while its writer lives, so that a reader can distinguish a killed run from one that still runs.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

#: The longest time that samples are buffered: one write for many is cheaper than one for each.
_WAIT_SECONDS = 1.0


class TimelineJournal:
    """Appends lines to a file; written lines survive the process. Safe to use from several threads.

    Args:
        path: the file; an existing one is truncated.
        columns: names of the numbers of a reading.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        with suppress(OSError):  # a reader holds it at the moment, or the file system has no locks
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock = threading.Lock()
        self._waiting: list[tuple[object, ...]] = []
        self._due = 0.0
        self.append("columns", *columns)

    def append(self, kind: str, *values: object) -> None:
        """Write the buffered lines and this one; an error such as a full disk closes the journal and is not raised."""
        with self._lock:
            self._waiting.append((kind, *values))
            self._write()

    def keep(self, kind: str, *values: object) -> None:
        """Buffer a line until the next one is written, for a second at most."""
        with self._lock:
            self._waiting.append((kind, *values))
            if time.monotonic() >= self._due:
                self._write()

    def _write(self) -> None:
        text = "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in self._waiting)
        self._waiting.clear()
        self._due = time.monotonic() + _WAIT_SECONDS
        try:
            if self._descriptor >= 0:
                os.write(self._descriptor, text.encode())
        except OSError:
            self._close()

    def close(self) -> None:
        """Write the last line and close the file; later lines are ignored."""
        self.append("end")
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
