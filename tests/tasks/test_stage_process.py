"""A stage's process is ended while its output is read: a process that goes on writing would not end otherwise."""

import ctypes
import operator
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlxflow.tasks import stage_process

#: A child that answers SIGTERM with more output than a pipe or a pseudo-terminal holds, and then ends.
_WRITES_WHILE_ENDING = """
import signal, sys, time
def end(number, frame):
    sys.stdout.write("x" * 200_000 + "last\\n")
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
while True:
    time.sleep(0.1)  # one long sleep would miss a signal that arrives just before it
"""

#: Runs a child as doit does, with a grace period so long that a test which needs it fails by its time limit.
_DOIT = """
import signal, sys
from pathlib import Path
from mlxflow.tasks import stage_process
stage_process._GRACE_SECONDS = 3600.0
stage_process.run_process([sys.executable, "-c", sys.argv[1]], Path("log"))
"""


def _read_all(descriptor: int, into: bytearray, seen: threading.Event) -> None:
    with suppress(OSError):  # Linux: the other end was closed
        while data := os.read(descriptor, 1 << 16):
            into += data
            if b"ready" in into:
                seen.set()


@pytest.mark.parametrize("on_terminal", [True, False])
def test_ctrl_c_ends_a_process_that_still_writes_and_keeps_its_last_output(tmp_path: Path, on_terminal: bool) -> None:
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    command = [sys.executable, "-c", _DOIT, _WRITES_WHILE_ENDING]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=theirs, start_new_session=True)
    os.close(theirs)
    output, seen = bytearray(), threading.Event()
    reader = threading.Thread(target=_read_all, args=(ours, output, seen))
    reader.start()
    try:
        assert seen.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT  # Python's own end by an unhandled KeyboardInterrupt
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(ours)
    log = (tmp_path / "log").read_bytes().replace(b"\r", b"")
    assert log.startswith(b"ready")
    assert log.endswith(b"xlast\n")
    assert len(log) > 200_000
    assert b"xlast" in output


def test_ctrl_c_that_arrives_just_before_the_wait_for_output_ends_a_silent_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python handles such a signal only after the wait; `map` calls both functions without handling it between."""
    wait = select.select

    def interrupt_and_wait(*arguments: Any) -> object:
        monkeypatch.setattr(select, "select", wait)
        calls: list[Any] = [ctypes.pythonapi.PyErr_SetInterrupt, partial(wait, *arguments)]
        return list(map(operator.call, calls))[1]

    monkeypatch.setattr(select, "select", interrupt_and_wait)
    silent = "import time; time.sleep(60); open('ended', 'w')"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stage_process.run_process([sys.executable, "-c", silent], Path("log"))
    assert not Path("ended").exists()


def test_a_process_that_ignores_sigterm_and_never_stops_writing_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_process, "_GRACE_SECONDS", 0.2)
    write = stage_process._write

    def interrupt(process: "subprocess.Popen[bytes]", data: bytes) -> None:
        write(process, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage_process, "_write", interrupt)
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data))
    stage = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: print('x' * 9999, flush=True)"
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stage_process.run_process([sys.executable, "-c", stage], tmp_path / "log")
    assert time.monotonic() - begin < 60
    assert not stage_process._running


def test_a_full_log_does_not_keep_a_process_from_ending(tmp_path: Path) -> None:
    """The first error is reported; later output is read and dropped."""

    class _Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", _WRITES_WHILE_ENDING], stdout=writing, start_new_session=True
    ) as process:
        os.close(writing)
        output = stage_process._Output(reading, _Full())  # type: ignore[arg-type]
        with pytest.raises(OSError, match="No space left"):
            output.copy()
        output.is_final = True
        stage_process._end(process, output)
        output.copy()
        assert (output.has_ended, process.returncode) == (True, 3)
    os.close(reading)
