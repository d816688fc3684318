"""Run a stage in a child process that ends with doit; its output goes to the terminal and to a log."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from mlxflow.device.child_processes import start
from mlxflow.messages import terminal
from mlxflow.messages.os_errors import naming
from mlxflow.storage.regular_files import open_log

_GRACE_SECONDS = 30

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
            try:
                _write(process, handover)
                _copy(output, file)
                return process.wait()
            except BaseException:
                _end(process)
                _copy(output, file)  # its last output
                raise
            finally:
                _running.discard(process)
    finally:
        for descriptor in (output, child_output):
            if descriptor >= 0:
                os.close(descriptor)


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


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Terminate a process group: SIGTERM, then SIGKILL after a grace period."""
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
    """Return both ends of a pseudo-terminal with the size of ours, so that progress bars are drawn."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    return ours, theirs


def _copy(source: int, log: BinaryIO) -> None:
    """Copy a process's output to standard error and a log until it ends; control characters are escaped."""
    shown = terminal.Foreign()
    data = b"-"
    while data:
        try:
            data = os.read(source, 1 << 16)
        except OSError:  # on Linux, the other end of the pseudo-terminal was closed
            data = b""
        if text := shown.feed(data, ends=not data):
            log.write(text)
            log.flush()
            with naming("standard error"):
                sys.stderr.flush()
                os.write(2, text)
