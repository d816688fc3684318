"""The watched side of `mlxflow.data.guard`: what a process says of its work on files of others, and its main loop.

Work is announced on a board, a piece of memory that the watching process reads. Announcing costs some 100 ns, so it is
done for each record, and also in processes without a watcher.
"""

import contextlib
import importlib
import mmap
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

from mlxflow.errors import SourceError, reason_of
from mlxflow.system import child_processes

#: Pieces of work that may be announced at a time; there are at most 256 workers.
NUM_SLOTS = 1024

_NUMBERS = 6  # of a slot: size + 1, progress, place, length of the text; of all its work so far: bytes, texts
_TEXT_BYTES = 1024
BOARD_BYTES = NUM_SLOTS * (8 * _NUMBERS + _TEXT_BYTES)


class Announced(NamedTuple):
    """A piece of work that goes on.

    Attributes:
        slot: its number.
        size: bytes of what it works on.
        progress: changes with every step.
        place: the record's line or number, 0 for none.
        subject: the file of others, as a message begins: its key and name.
        on: what it works on, such as a file of the corpus; empty for the subject itself.
    """

    slot: int
    size: int
    progress: int
    place: int
    subject: str
    on: str


class Board:
    """What goes on in a process.

    Args:
        memory: of BOARD_BYTES, shared with the process that watches; None for memory of this process alone.
    """

    def __init__(self, memory: "mmap.mmap | bytearray | None" = None) -> None:
        view = memoryview(bytearray(BOARD_BYTES) if memory is None else memory)
        self.numbers = view[: 8 * _NUMBERS * NUM_SLOTS].cast("q")
        self.texts = view[8 * _NUMBERS * NUM_SLOTS :]
        self.free = list(range(NUM_SLOTS))

    def announced(self) -> list[Announced]:
        """Return what goes on now."""
        numbers, found = self.numbers.tolist(), []
        for slot in range(NUM_SLOTS):
            size, progress, place, length = numbers[slot * _NUMBERS : slot * _NUMBERS + 4]
            if size:
                begin = slot * _TEXT_BYTES
                subject, _, on = bytes(self.texts[begin : begin + length]).decode(errors="replace").partition("\n")
                found.append(Announced(slot, size - 1, progress, place, subject, on))
        return found

    def worked_on(self) -> tuple[int, int]:
        """Return the bytes and the number of texts of all work so far, what goes on now included."""
        numbers = self.numbers.tolist()
        return sum(numbers[4::_NUMBERS]), sum(numbers[5::_NUMBERS])


_board = Board()


class Work:
    """A piece of work on a file of others, announced while its block runs.

    A panic or a bare `Exception` of a library in Rust, and a want of memory, become errors that name the file.

    Args:
        subject: the file of others, as a message begins: its key and name.
        on: what is worked on; empty for the subject itself.
        size: bytes of that.
        own: bytes of the subject, where this work may have to read it again.
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
            size: its bytes; None leaves the size as it is.
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
            said = reason_of(error) or "out of memory"
            raise SourceError(f"{self._subject} failed ({said}). Fix it or name another.") from None


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic of a library in Rust: its class has no name that could be imported."""
    return type(error).__name__ == "PanicException"


def main(arguments: list[str]) -> int:
    """Do what the watching process asks, until it closes the connection or is gone.

    Args:
        arguments: the descriptors of the connection, of the board and of the terminal for messages; descriptor 2 is
            a file, for what libraries print.
    """
    global _board
    connection, board, messages = map(int, arguments)
    sys.stderr = open(messages, "w", buffering=1, errors="backslashreplace")  # noqa: PTH123, SIM115 - until the end
    signal.signal(signal.SIGTERM, _terminate)
    asked = Connection(connection)
    child_processes.end_with_parent()
    _board = Board(mmap.mmap(board, BOARD_BYTES))
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while True:
            name, values = asked.recv()
            asked.send(_answer(name, values))
    return 0


def _answer(name: str, values: tuple[Any, ...]) -> tuple[bool, Any]:
    """Return whether a call went well, with its result or its error."""
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
