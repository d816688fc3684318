"""Run untrusted chat templates and tokenizers in a child process with limits on processor time and memory.

Templates and the patterns of tokenizers are programs: `9**9**9` blocks the interpreter and `'x' * 10**10` exhausts
memory, so they cannot be stopped from inside the process. The limits grow with the size of the input; see
`mlxflow.data.watched`. Only processor time counts: a slow disk, a busy machine and waiting for a lock do not. Nor does
importing installed packages; see `mlxflow.data.import_timing`. A process in a deadlock, which uses no processor time
for long, is ended, too, whether it works on an untrusted file or not.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from mmap import mmap
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

import psutil

from mlxflow.data.watched import BOARD_BYTES, Announced, Board
from mlxflow.device import child_processes
from mlxflow.messages.errors import SourceError, StageError
from mlxflow.storage import temporary_files

_LOOKS_SECONDS = 0.1
_GRACE_SECONDS = 10
_MEMORY_SHARE = 0.75
_SENT_AT_ONCE_BYTES = 4096  # less than a connection holds anywhere, when the process has answered all earlier calls
_IDLE_PROCESSOR_SECONDS = 0.1  # threads that only wait for a clock take less in ten minutes

# Someone has stopped it, or its disk does not answer
_WAITING_STATES = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_DISK_SLEEP)


class ProcessLimits(NamedTuple):
    """Limits of work on untrusted files, about a hundred times above what usual files need.

    Attributes:
        seconds: of processor time without progress.
        seconds_per_byte: additional, for each byte of input.
        bytes: of memory allocated without progress.
        bytes_per_byte: additional, for each byte of input.
        run_seconds: of processor time for all work of a process.
        run_seconds_per_byte: additional, for each byte of input so far.
        run_seconds_per_text: additional, for each text so far: a record, or a batch of documents.
        module_seconds: additional to `seconds`, while a module is being imported.
        idle_seconds: of wall-clock time without progress and without processor time, except for announced waits.
    """

    seconds: float = 10
    seconds_per_byte: float = 20e-6
    bytes: int = 2 << 30
    bytes_per_byte: int = 512
    run_seconds: float = 60
    run_seconds_per_byte: float = 20e-6
    run_seconds_per_text: float = 0.02
    module_seconds: float = 60
    idle_seconds: float = 600


LIMITS = ProcessLimits()


class Guard:
    """A child process that executes calls under the limits. It ends with the context and leaves no temporary files."""

    def __enter__(self) -> Self:
        """Start the process."""
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(temporary_files.scratch_folder())
            self._printed = stack.enter_context(tempfile.TemporaryFile())
            shared = stack.enter_context(tempfile.TemporaryFile())
            shared.truncate(BOARD_BYTES)
            self._board = Board(mmap(shared.fileno(), BOARD_BYTES))
            self._connection, theirs = Pipe()
            stack.callback(self._connection.close)
            messages = _stderr()
            stack.callback(os.close, messages)
            passed = (theirs.fileno(), shared.fileno(), messages)
            self._process = child_processes.start(
                [sys.executable, "-P", "-m", "mlxflow.data.watched", *map(str, passed)],
                pass_fds=passed,
                stderr=self._printed,
                env=os.environ | {"TMPDIR": str(scratch)},
            )
            theirs.close()
            stack.callback(self.end)
            self._watched = psutil.Process(self._process.pid)
            self._spent: defaultdict[str, float] = defaultdict(float)  # seconds of processor time by untrusted file
            self._counted = 0.0  # seconds already counted, or of no announced work
            self._stack = stack.pop_all()
        return self

    def call(self, name: str, *values: Any) -> Any:
        """Call a function in the process; return its result or raise its exception.

        Args:
            name: "module:function".
            values: its arguments, which can be pickled.

        Raises:
            SourceError: the work exceeded its limits or ended the process; the message names the file.
            StageError: the process ended while it worked on no untrusted file, or it is in a deadlock.
        """
        self._send(bytes(ForkingPickler.dumps((name, values))))
        try:
            self._wait(name)
        except (_TooMuchError, _DeadlockError):
            self._process.kill()  # it may block the interpreter, or still allocate memory
            raise
        try:
            went_well, result = self._connection.recv()
        except (EOFError, OSError):  # the latter within an answer
            self._refuse_dead()
        if not went_well:
            raise result
        return result

    def _send(self, data: bytes) -> None:
        """Send a call to the process, in a thread if the process has to read a part of it first: it may hang."""

        def send(connection: "Connection[Any, Any]") -> None:
            with contextlib.suppress(OSError):  # the process has ended
                connection.send_bytes(data)

        def send_by_copy(connection: "Connection[Any, Any]") -> None:
            with connection:  # of its own: the other one is closed when the process has been ended
                send(connection)

        if len(data) <= _SENT_AT_ONCE_BYTES:
            send(self._connection)
        else:
            copy = Connection(os.dup(self._connection.fileno()))
            threading.Thread(target=send_by_copy, args=(copy,), name="sends a call", daemon=True).start()

    def _wait(self, name: str) -> None:
        """Wait for an answer or the end of the process.

        Args:
            name: of the called function, for messages.

        Raises:
            SourceError: the work exceeded its limits, or ended the process.
            StageError: the process ended while it worked on no untrusted file, or it is in a deadlock.
        """
        process = self._watched
        since: dict[int, tuple[int, float]] = {}  # for each piece of work: its progress, and when it was first observed
        moved_at, memory_before = 0.0, 0  # time of the last progress, and memory at that time
        idle = _IdleTime()
        while not self._has_answered():
            work, (importing, imported) = self._board.announced(), self._board.imports()
            try:
                spent, memory = sum(process.cpu_times()[:2]), process.memory_info().rss
            except psutil.Error:
                continue  # the process has ended, and its exit code is known next
            used = spent - imported
            now = {one.slot: (one.progress, used) for one in work}
            moved = any(slot not in since or since[slot][0] != progress for slot, (progress, _) in now.items())
            if moved:
                moved_at, memory_before = used, memory
            since = {s: since[s] if s in since and since[s][0] == now[s][0] else now[s] for s in now}
            self._count(work, used)
            idle.add(spent, moved=moved or self._board.is_waiting)
            oldest = min(work, key=lambda one: since[one.slot][1], default=None)
            _check_idle(_named(oldest) if oldest else f"the guarded process, in {name},", idle.seconds, process)
            if oldest:
                size = sum(one.size for one in work)
                _check_seconds(oldest, size, used - moved_at - LIMITS.module_seconds * (importing > 0))
                _check_memory(oldest, size, memory, memory_before, process)
                if not importing:
                    _check_run(self._spent, *self._board.worked_on())

    def _has_answered(self) -> bool:
        """Wait for an answer for a moment, and return whether there is one.

        Raises:
            SourceError: the process has ended and will not answer.
            StageError: it ended while it worked on no untrusted file.
        """
        if not self._connection.poll(_LOOKS_SECONDS) and self._process.poll() is not None:
            if not self._connection.poll(0):
                self._refuse_dead()
            return True
        return self._connection.poll(0)

    def _count(self, work: list[Announced], used: float) -> None:
        """Add the processor time since the last check to the untrusted files in use."""
        for one in work:
            self._spent[one.subject] += (used - self._counted) / len(work)
        self._counted = used

    def _refuse_dead(self) -> NoReturn:
        """Raise the error for a process that ended without an answer."""
        code = self._end(_GRACE_SECONDS)
        work = self._board.announced()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        if last := self._last_line():
            how += f" ({last})"
        if work:
            raise SourceError(f"{_named(work[0])} ended its process, {how}. Fix it or name another.")
        raise StageError(f"the guarded process ended {how}. Run it again.")

    def _last_line(self) -> str:
        self._printed.seek(0)
        lines = self._printed.read(1 << 16).decode(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")

    def end(self) -> int:
        """Kill the process, wait for its end and return its id."""
        if self._process.poll() is None:
            self._process.terminate()
        self._end(_GRACE_SECONDS)
        return self._process.pid

    def _end(self, seconds: float) -> int:
        """Wait for the end of the process, kill it if that takes longer, and return its exit code."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class _TooMuchError(SourceError):
    """Work exceeded its limits."""


class _DeadlockError(StageError):
    """A process uses no processor time."""


class _IdleTime:
    """The wall-clock time in which a process uses no processor time.

    Attributes:
        seconds: since it last used some or made progress.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._spent, self._looked = 0.0, time.monotonic()

    def add(self, spent: float, *, moved: bool) -> None:
        """Add the time since the last call, at most a second: a guard that is suspended may suspend the other, too.

        Args:
            spent: the processor time of the process so far.
            moved: whether it made progress, or waits for another process.
        """
        now = time.monotonic()
        self.seconds += min(now - self._looked, 1)
        self._looked = now
        if moved or spent > self._spent + _IDLE_PROCESSOR_SECONDS:
            self.seconds, self._spent = 0.0, spent


def guarded(name: str, *values: Any) -> Any:
    """Return the result of a function called in a new guarded process; see `Guard.call`."""
    with Guard() as guard:
        return guard.call(name, *values)


def _stderr() -> int:
    """Return a copy of standard error's descriptor; of the null device if there is none."""
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def _check_idle(subject: str, seconds: float, process: psutil.Process) -> None:
    if seconds > (limit := LIMITS.idle_seconds) and process.status() not in _WAITING_STATES:
        raise _DeadlockError(f"{subject} hangs: no processor time for {limit:,.3g} s. Run it again.")


def _check_seconds(work: Announced, size: int, used: float) -> None:
    limit = LIMITS.seconds + LIMITS.seconds_per_byte * size
    if used > limit:
        raise _TooMuchError(f"{_named(work)} took over {limit:,.3g} s of processor time. Fix it or name another.")


def _check_run(spent: Mapping[str, float], size: int, texts: int) -> None:
    """Check the total time against the total input: each text alone may be within its limit."""
    limit = LIMITS.run_seconds + LIMITS.run_seconds_per_byte * size + LIMITS.run_seconds_per_text * texts
    if sum(spent.values()) > limit:
        subject, seconds = max(spent.items(), key=lambda one: one[1])
        raise _TooMuchError(
            f"{subject} took {seconds:,.0f} s of processor time for {texts:,} texts of {size:,} bytes in all, "
            f"{size / seconds:,.0f} bytes a second. Fix it or name another."
        )


def _check_memory(work: Announced, size: int, rss: int, before: int, process: psutil.Process) -> None:
    """Check the memory allocated since the last progress; the tokenizer's own memory was allocated before."""
    limit = before + LIMITS.bytes + LIMITS.bytes_per_byte * size
    limit = min(limit, int(_MEMORY_SHARE * psutil.virtual_memory().total))
    if rss > limit and _own_memory(process, rss) > limit:  # excludes pages of mapped files
        raise _TooMuchError(
            f"{_named(work)} took over {(limit - before) / 1e9:,.3g} GB of memory. Fix it or name another."
        )


def _own_memory(process: psutil.Process, rss: int) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return rss


def _named(work: Announced) -> str:
    """Return the beginning of a message about some work."""
    place = f":{work.place}" if work.place else ""
    size = f" ({work.size:,} bytes)" if work.size else ""
    return f"{work.subject}, reading {work.on}{place}{size}," if work.on else work.subject
