"""A stage in a process of its own: what it prints goes to the terminal and to a log, and it never outlives doit."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from mlxflow.storage.regular_files import open_log
from mlxflow.system import terminal
from mlxflow.system.child_processes import start
from mlxflow.system.os_errors import naming

_GRACE_SECONDS = 30

_running: set["subprocess.Popen[bytes]"] = set()


def run_process(command: Sequence[str], log: Path, handover: bytes = b"") -> int:
    """Run a command to its end and return its exit code.

    Args:
        command: program and arguments; no shell.
        log: receives all that is printed, from the beginning.
        handover: what the process reads from its standard input.

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
            try:
                _write(process, handover)
                _copy(output, file)
                return process.wait()
            except BaseException:
                _end(process)
                _copy(output, file)  # what it said of its end
                raise
            finally:
                _running.discard(process)
    finally:
        for descriptor in (output, child_output):
            if descriptor >= 0:
                os.close(descriptor)


def _write(process: "subprocess.Popen[bytes]", data: bytes) -> None:
    """Write what a process reads from its standard input, and close that; one that ended says why itself."""
    if process.stdin is None:
        return
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(data)


def end_all() -> None:
    """End every process that is running, and wait for it."""
    for process in list(_running):
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask a process to end, then make it."""
    if process.poll() is not None:
        return
    for number, patience in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


def _open_terminal() -> tuple[int, int]:
    """Return both ends of a terminal as wide as ours, so that progress bars draw themselves."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    return ours, theirs


def _copy(source: int, log: BinaryIO) -> None:
    """Copy what a process prints to standard error and to a log, until it closes its end; what is unsafe is escaped."""
    shown = terminal.Foreign()
    data = b"-"
    while data:
        try:
            data = os.read(source, 1 << 16)
        except OSError:  # Linux: the other end of a terminal was closed
            data = b""
        if text := shown.feed(data, ends=not data):
            log.write(text)
            log.flush()
            with naming("standard error"):
                sys.stderr.flush()
                os.write(2, text)
