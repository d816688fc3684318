"""The child side of `mlxflow.data.guard`: announces work on untrusted files, and executes calls.

Work is announced on a board, shared memory that the guarding process reads. An announcement takes about 100 ns, so
every record is announced, also in processes without a guard.
"""

import contextlib
import importlib
import mmap
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

from mlxflow.data.import_timing import ImportTimer
from mlxflow.device import child_processes
from mlxflow.messages.errors import SourceError, reason_of

#: Maximum number of pieces of work announced at a time; there are at most 256 workers.
NUM_SLOTS = 1024

_NUMBERS = 6  # fields of a slot: size + 1, progress, position, length of the text; total so far: bytes, texts
_TEXT_BYTES = 1024
_STATE_BYTES = 24  # modules in execution, nanoseconds of importing, waits for other processes
BOARD_BYTES = NUM_SLOTS * (8 * _NUMBERS + _TEXT_BYTES) + _STATE_BYTES


class Announced(NamedTuple):
    """A piece of work in progress.

    Attributes:
        slot: its number.
        size: bytes of its input.
        progress: changes with every step.
        place: the record's line or number; 0 for none.
        subject: the untrusted file, for the beginning of error messages: its key and name.
        on: its input, such as a file of the corpus; empty for the subject itself.
    """

    slot: int
    size: int
    progress: int
    place: int
    subject: str
    on: str


class Board:
    """The announced work of a process.

    Args:
        memory: of BOARD_BYTES, shared with the guarding process; None for private memory.
    """

    def __init__(self, memory: "mmap.mmap | bytearray | None" = None) -> None:
        view = memoryview(bytearray(BOARD_BYTES) if memory is None else memory)
        self.numbers = view[: 8 * _NUMBERS * NUM_SLOTS].cast("q")
        self.texts = view[8 * _NUMBERS * NUM_SLOTS : -_STATE_BYTES]
        self._state = view[-_STATE_BYTES:].cast("q")
        self._lock = threading.Lock()
        self.free = list(range(NUM_SLOTS))

    def announced(self) -> list[Announced]:
        """Return the work in progress."""
        numbers, pieces = self.numbers.tolist(), []
        for slot in range(NUM_SLOTS):
            size, progress, place, length = numbers[slot * _NUMBERS : slot * _NUMBERS + 4]
            if size:
                begin = slot * _TEXT_BYTES
                subject, _, on = bytes(self.texts[begin : begin + length]).decode(errors="replace").partition("\n")
                pieces.append(Announced(slot, size - 1, progress, place, subject, on))
        return pieces

    def worked_on(self) -> tuple[int, int]:
        """Return the bytes and the number of texts of all work so far, including work in progress."""
        numbers = self.numbers.tolist()
        return sum(numbers[4::_NUMBERS]), sum(numbers[5::_NUMBERS])

    def imports(self) -> tuple[int, float]:
        """Return how many modules are being imported, and the seconds of processor time that imports took so far.

        The module that a thread executes at present is not included in the seconds.
        """
        importing, nanoseconds, _ = self._state.tolist()
        return importing, nanoseconds / 1e9

    @property
    def is_waiting(self) -> bool:
        """Whether the process waits for another one; see `waiting`."""
        return bool(self._state[2])

    def add_waiting(self, change: int) -> None:
        """Announce the beginning or the end of a wait; see `waiting`."""
        with self._lock:
            self._state[2] += change

    def add_imports(self, change: int, nanoseconds: int) -> None:
        """Announce the beginning or the end of an import; see `ImportTimer`."""
        with self._lock:
            self._state[0] += change
            self._state[1] += nanoseconds


_board = Board()


class Work:
    """A piece of work on an untrusted file, announced while its context is open.

    A Rust panic, a bare `Exception` of a Rust library and out of memory become errors that name the file.

    Args:
        subject: the untrusted file, for the beginning of error messages: its key and name.
        on: the input; empty for the subject itself.
        size: bytes of the input.
        own: bytes of the subject, if this work may read it again.
    """

    def __init__(self, subject: str, on: str = "", size: int = 0, *, own: int = 0) -> None:
        self._subject = subject
        self._text = f"{subject}\n{on}".encode(errors="replace")[:_TEXT_BYTES]
        self._size, self._own = size, own
        self._numbers = _board.numbers
        self._at = 0

    def __enter__(self) -> Self:
        slot = _board.free.pop()
        self._at = slot * _NUMBERS
        _board.texts[slot * _TEXT_BYTES : slot * _TEXT_BYTES + len(self._text)] = self._text
        self._numbers[self._at + 3] = len(self._text)
        self.step(0, self._size)
        return self

    def step(self, place: int, size: int | None = None) -> None:
        """Announce the next record.

        Args:
            place: its line or number.
            size: its bytes; None leaves the size unchanged.
        """
        numbers, at = self._numbers, self._at
        numbers[at + 1] += 1
        numbers[at + 2] = place
        if size is not None:
            numbers[at] = size + self._own + 1
            numbers[at + 4] += size
            numbers[at + 5] += size > 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._numbers[self._at] = 0
        _board.free.append(self._at // _NUMBERS)
        if error is not None and (is_panic(error) or type(error) is Exception or isinstance(error, MemoryError)):
            reason = reason_of(error) or "out of memory"
            raise SourceError(f"{self._subject} failed ({reason}). Fix it or name another.") from None


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Announce that this process waits for another one, perhaps for hours, until the block ends: it does not hang."""
    _board.add_waiting(1)
    try:
        yield
    finally:
        _board.add_waiting(-1)


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a Rust panic: its class cannot be imported by name."""
    return type(error).__name__ == "PanicException"


def main(arguments: list[str]) -> int:
    """Execute the calls of the guarding process until it closes the connection or ends.

    Args:
        arguments: descriptors of the connection, of the board and of standard error for messages; descriptor 2 is a
            file for the output of libraries.
    """
    global _board
    connection, board, messages = descriptors = list(map(int, arguments))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    sys.stderr = open(messages, "w", buffering=1, errors="backslashreplace")  # noqa: PTH123, SIM115 - until the end
    signal.signal(signal.SIGTERM, _terminate)
    calls = Connection(connection)
    child_processes.end_with_parent()
    _board = Board(mmap.mmap(board, BOARD_BYTES))
    timer = ImportTimer(_board.add_imports)
    timer.install()
    os.register_at_fork(after_in_child=timer.stop)
    os.register_at_fork(after_in_child=calls.close)  # the guard must see the end of this process, whoever outlives it
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            name, values = calls.recv()
            calls.send(_answer(name, values))
    return 0


def _answer(name: str, values: tuple[Any, ...]) -> tuple[bool, Any]:
    """Return whether a call succeeded, with its result or its error."""
    module, _, function = name.partition(":")
    try:
        return True, getattr(importlib.import_module(module), function)(*values)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if not type(error).__module__.startswith("mlxflow."):
            error.add_note(f"In the guarded process:\n{''.join(traceback.format_tb(error.__traceback__))}")
        return False, RuntimeError(str(error)) if is_panic(error) else error


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    from mlxflow.data import watched

    sys.exit(watched.main(sys.argv[1:]))
