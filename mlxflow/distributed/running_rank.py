"""A rank that runs, on this host or another one, as the supervisor sees it."""

import abc
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mlxflow.distributed.heartbeat import Beat, Failure, read_message
from mlxflow.messages import terminal
from mlxflow.messages.os_errors import naming

# Output before the first heartbeat is printed with it, or after this time: a failing start has its traceback in the log
_HELD_SECONDS = 20.0

_MAX_HELD = 1000

#: How long a rank may take to end after it said why.
END_SECONDS = 20.0


class RunningRank(abc.ABC):
    """A running rank.

    Args:
        number: of the rank.
        host: its name, of a rank on another host; empty for one on this host.
        log: the file for its output.
        open_log: opens it for writing.

    Attributes:
        number: of the rank.
        name: in messages, such as "rank 1" or "rank 1 on mac-b".
        beat: what it does.
        failure: why it is about to end; None while it runs well.
        last_line: of its output.
        pipes: descriptors to read with `read`, until each has ended.
    """

    def __init__(self, number: int, host: str, log: Path, open_log: Callable[[Path], BinaryIO]) -> None:
        self.number = number
        self.name = f"rank {number} on {host}" if host else f"rank {number}"
        self.beat = Beat()
        self.failure: Failure | None = None
        self._failed_at = 0.0
        self.last_line = ""
        self.pipes: set[int] = set()
        self._messages = b""
        self._line = b""
        self._held: list[str] | None = []
        self._begun = time.monotonic()
        self._log_name = log
        self._log = open_log(log)

    @abc.abstractmethod
    def read(self, pipe: int) -> bool:
        """Take what is in a pipe; return whether it is a sign of life from the training."""

    @abc.abstractmethod
    def signal(self, number: int) -> None:
        """Send a signal to the rank and the processes it started, unless it has ended."""

    @property
    @abc.abstractmethod
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""

    @property
    @abc.abstractmethod
    def is_stopped(self) -> bool:
        """Whether SIGSTOP or a debugger stopped the process."""

    @abc.abstractmethod
    def end(self) -> None:
        """Kill it if it still runs, and wait for its end."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the pipes and the log."""

    def tick(self) -> None:
        """Do what is due from time to time."""
        if self._held and time.monotonic() > self._begun + _HELD_SECONDS:
            self.release()

    @property
    def hangs_in_its_end(self) -> bool:
        """Whether it said long ago why it ends and still runs, such as one that waits for a collective of its GPU."""
        has_failed = self.failure is not None and self._failed_at > 0
        return has_failed and time.monotonic() > self._failed_at + END_SECONDS

    @property
    def is_training(self) -> bool:
        """Whether it runs and its training is not over."""
        return self.exit_code is None and not self.beat.is_done

    def _take_beats(self, data: bytes) -> bool:
        """Take bytes from the pipe of heartbeats; return whether there was a message."""
        *lines, self._messages = (self._messages + data).split(b"\n")
        for line in lines:
            message = read_message(line)
            if isinstance(message, Beat):
                self.beat = message
            elif message is not None:
                self.failure, self._failed_at = message, time.monotonic()
        if lines:
            self.release()
        return bool(lines)

    def _show(self, data: bytes) -> None:
        """Print whole lines with the rank in front, and log them; no data is the end of the output."""
        with naming(self._log_name):
            self._log.write(data)
            self._log.flush()
        *lines, self._line = (self._line + data).split(b"\n")
        if not data and self._line:
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            text = line.decode(errors="backslashreplace")
            self.last_line = text.strip() or self.last_line
            if self._held is None or len(self._held) >= _MAX_HELD:
                terminal.say(f"rank {self.number}: {text}")
            else:
                self._held.append(text)

    def release(self) -> None:
        """Print the output that was held back."""
        held, self._held = self._held or [], None
        for text in held:
            terminal.say(f"rank {self.number}: {text}")
