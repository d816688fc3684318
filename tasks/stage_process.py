"""Run a stage in a child process that ends with doit; its output goes to the terminal and to a log."""

import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from mlxflow.device.child_processes import start
from mlxflow.messages import terminal
from mlxflow.messages.os_errors import naming
from mlxflow.storage.regular_files import open_log

_GRACE_SECONDS = 30.0

# How often a process that is being ended is polled while its output is read
_POLL_SECONDS = 0.05

# The longest wait of one system call. Python handles a signal that arrives just before the call only after it: Ctrl-C
# sent as soon as a line was printed would have no effect until the next one.
_WAIT_SECONDS = 0.5

_running: set["subprocess.Popen[bytes]"] = set()


def run_process(command: Sequence[str], log: Path, handover: bytes = b"") -> int:
    """Run a command to its end and return its exit code.

    Args:
        command: program and arguments; no shell.
        log: the file for the output; an existing one is replaced.
        handover: the standard input of the process.

    Raises:
        StageError: the log cannot be written.
    """
    on_terminal = sys.stderr.isatty()
    output, child_output = _open_terminal() if on_terminal else os.pipe()
    try:
        with naming(log), open_log(log) as file:
            process = start(
                command,
                stdin=subprocess.PIPE,
                stdout=child_output,
                stderr=child_output,
                start_new_session=True,
                env={**os.environ, "PYTHONSAFEPATH": "1"},
            )
            os.close(child_output)
            child_output = -1
            _running.add(process)
            copied = _Output(output, file)
            try:
                _write(process, handover)
                copied.copy()
                return _exit_code(process)
            except BaseException:
                copied.is_final = True
                _end(process, copied)
                copied.copy()  # its last output
                raise
            finally:
                _running.discard(process)
    finally:
        for descriptor in (output, child_output):
            if descriptor >= 0:
                os.close(descriptor)


def _exit_code(process: "subprocess.Popen[bytes]") -> int:
    """Wait for the end of a process; see `_WAIT_SECONDS`."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_WAIT_SECONDS)


def _write(process: "subprocess.Popen[bytes]", data: bytes) -> None:
    """Write a process's standard input and close it; a process that has ended already is ignored."""
    if process.stdin is None:
        return
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(data)


def end_all() -> None:
    """Terminate every running process and wait for it."""
    for process in list(_running):
        _end(process)


def _end(process: "subprocess.Popen[bytes]", output: "_Output | None" = None) -> None:
    """Terminate a process group: SIGTERM, then SIGKILL after a grace period.

    Args:
        process: the leader of the group.
        output: of the process, if no other thread reads it. It is read meanwhile: a process that writes more than a
            pipe holds does not end before, and on macOS none does whose output on a pseudo-terminal is not read.
    """
    if process.poll() is not None:
        return
    for number, patience in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, math.inf)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):  # it has ended; macOS denies signals to a group of dead processes
            return
        if _has_ended(process, output, patience):
            return


def _has_ended(process: "subprocess.Popen[bytes]", output: "_Output | None", seconds: float) -> bool:
    """Wait for the end of a process while its output is read; return False if it takes longer than some seconds."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        if output is None or output.has_ended:
            with suppress(subprocess.TimeoutExpired):
                process.wait(None if left == math.inf else left)
        else:
            output.copy(min(left, _POLL_SECONDS))
    return True


def _open_terminal() -> tuple[int, int]:
    """Return both ends of a pseudo-terminal with the size of ours, so that progress bars are drawn."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    return ours, theirs


class _Output:
    """The output of a process, copied to standard error and a log; control characters are escaped.

    Args:
        source: the descriptor to read.
        log: the file that gets a copy.

    Attributes:
        has_ended: whether all of it was read.
        is_final: the process is being ended: what cannot be written is still read, and the first error counts.
    """

    def __init__(self, source: int, log: BinaryIO) -> None:
        self._source, self._log = source, log
        self._shown = terminal.Foreign()
        self.has_ended = False
        self.is_final = False

    def copy(self, seconds: float | None = None) -> None:
        """Copy the output until it ends, or for some seconds."""
        deadline = time.monotonic() + seconds if seconds is not None else math.inf
        while not self.has_ended and (left := deadline - time.monotonic()) > 0:
            if select.select([self._source], [], [], min(left, _WAIT_SECONDS))[0]:
                self._copy_piece()

    def _copy_piece(self) -> None:
        try:
            data = os.read(self._source, 1 << 16)
        except OSError:  # on Linux, the other end of the pseudo-terminal was closed
            data = b""
        self.has_ended = not data
        if text := self._shown.feed(data, ends=not data):
            with suppress(*([OSError] if self.is_final else [])):
                self._log.write(text)
                self._log.flush()
                with naming("standard error"):
                    sys.stderr.flush()
                    os.write(2, text)
