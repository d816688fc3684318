"""Processes that end with the one that started them, however that one ends.

A thread that waits for that end is not enough: code in C may hold the interpreter for hours, and no thread runs. So the
kernel is asked to kill the process on Linux. Elsewhere a small process beside it does,
`mlxflow.system.parent_watcher`.
"""

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

#: Names the descriptor of a pipe that closes when the process that started this one ends.
PARENT_VARIABLE = "MLXFLOW_PARENT_FD"

_HAS_DEATH_SIGNAL = sys.platform == "linux"

_PR_SET_PDEATHSIG = 1


def start(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """Start a process that ends with this one, if it calls `end_with_parent` or the system has no such signal.

    May be called from any thread: Linux takes the end of the *thread* that starts a process for its parent's, so all
    are started by one that does not end.

    Args:
        command: program and arguments; no shell. On other systems than Linux its whole process group is killed, so it
            is the leader of one.
        options: of `subprocess.Popen`.
    """
    reading = _life_pipe()[0]
    passed = (*options.get("pass_fds", ()), reading)
    options |= {"env": {**(options.get("env") or os.environ), PARENT_VARIABLE: str(reading)}, "pass_fds": passed}
    if _HAS_DEATH_SIGNAL:
        return _starter().submit(lambda: subprocess.Popen(command, **options)).result()
    process = subprocess.Popen(command, **({"start_new_session": True} | options))
    watcher = [
        sys.executable,
        "-I",
        "-S",
        str(Path(__file__).with_name("parent_watcher.py")),
        str(reading),
        str(process.pid),
    ]
    quiet = subprocess.DEVNULL
    watching = subprocess.Popen(
        watcher, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=(reading,), start_new_session=True
    )
    threading.Thread(target=watching.wait, daemon=True).start()  # it ends when the process does
    return process


@cache
def _life_pipe() -> tuple[int, int]:
    """Return both ends of a pipe of which nobody but this process holds the writing end."""
    return os.pipe()


@cache
def _starter() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "starts processes")


def end_with_parent() -> bool:
    """End this process at once when the one that started it by `start` ends, so that no orphan goes on computing.

    What was begun is left in the private folder, which the next run removes.

    Returns:
        whether it was started that way.
    """
    descriptor = os.environ.pop(PARENT_VARIABLE, None)
    if descriptor is None:
        return False
    pipe = int(descriptor)
    os.set_inheritable(pipe, False)
    if _HAS_DEATH_SIGNAL:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([pipe], [], [], 0)[0]:  # it ended before that
        os._exit(128 + signal.SIGTERM)

    def watch() -> None:
        os.read(pipe, 1)  # returns when the other end closes
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return True
