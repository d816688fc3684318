"""What a profiler sees, written down as it goes: a program that is killed leaves all but the samples of a last second.

Each line is a JSON list, its first word the kind:

    ["columns", "seconds", ...]                        once, the first: the numbers of a reading
    ["step", 3, 0.51, ...]                             a step's end: its number and the reading
    ["sample", 0.55, ...]                              a reading of the sampling thread
    ["enter", "training_step/update", 0.49]            a phase begins, at that second
    ["phase", "training_step/update", 0.49, 0.51, 900] it ended: from, to, peak in bytes
    ["end"]                                            the profiler was closed; whoever is killed leaves no such line

The file is locked as long as its writer lives, so that a reader can tell a run that is cut off from one that goes on.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

#: Samples wait so long for a line that is written at once: one write for many costs less than one each.
_WAIT_SECONDS = 1.0


class TimelineJournal:
    """Appends lines to a file; what was written outlives the process. May be used from several threads.

    Args:
        path: begun anew.
        columns: names of the numbers of a reading.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o666)
        with suppress(OSError):  # somebody looks just now, or the file system has no locks
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock = threading.Lock()
        self._waiting: list[tuple[object, ...]] = []
        self._due = 0.0
        self.append("columns", *columns)

    def append(self, kind: str, *values: object) -> None:
        """Write a line, and those that wait before it; a disk that takes no more ends the journal, not the program."""
        with self._lock:
            self._waiting.append((kind, *values))
            self._write()

    def keep(self, kind: str, *values: object) -> None:
        """Let a line wait for the next one that is written, a second at most."""
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
        """Write that it ended; further lines are left out."""
        self.append("end")
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
