"""Child processes that are killed when their parent ends, however it ends.

A thread that watches the parent is not enough: C code may hold the interpreter for hours, and then no thread runs. On
Linux the kernel kills the child (PR_SET_PDEATHSIG). Elsewhere a small watcher process does,
`mlxflow.device.parent_watcher`.
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

#: The environment variable with the descriptor of a pipe that closes when the parent ends.
PARENT_VARIABLE = "MLXFLOW_PARENT_FD"

_HAS_DEATH_SIGNAL = sys.platform == "linux"

_PR_SET_PDEATHSIG = 1


def start(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """Start a child process that ends with this one; on Linux it must call `end_with_parent`.

    May be called from any thread. On Linux the death signal is tied to the *thread* that starts a child, so one thread
    that never ends starts all of them.

    Args:
        command: program and arguments; no shell. On other systems than Linux it becomes the leader of a process group,
            and the whole group is killed.
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
    threading.Thread(target=watching.wait, daemon=True).start()  # the watcher ends when the child does
    return process


@cache
def _life_pipe() -> tuple[int, int]:
    """Return a pipe, reading and writing end; only this process holds the writing end."""
    return os.pipe()


@cache
def _starter() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "starts processes")


def end_with_parent() -> bool:
    """Make this process exit as soon as the parent that started it by `start` ends.

    Unfinished files stay in the private folder, which the next run removes.

    Returns:
        whether this process was started by `start`.
    """
    descriptor = os.environ.pop(PARENT_VARIABLE, None)
    if descriptor is None:
        return False
    pipe = int(descriptor)
    os.set_inheritable(pipe, False)
    if _HAS_DEATH_SIGNAL:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([pipe], [], [], 0)[0]:  # the parent has ended already
        os._exit(128 + signal.SIGTERM)

    def watch() -> None:
        os.read(pipe, 1)  # returns when the other end closes
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return True
