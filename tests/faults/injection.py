"""Commands with a library preloaded that makes chosen file calls below a folder fail, do half, or end the process."""

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

SOURCE = Path(__file__).with_name("injector.c")

#: What the library takes for FAULT_ERRNO, by the names that it writes into its log.
KINDS = {
    "KILL": -1,
    "HALF": -2,
    **{name: getattr(errno, name) for name in ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENFILE", "EINTR")},
}

_LONGEST_SECONDS = 120


class Fault(NamedTuple):
    """A fault of some calls.

    Attributes:
        kind: a key of `KINDS`.
        first: the number of the call that meets it, from 1; the next one that can, where that one cannot.
        times: how many calls meet it.
        each: so many calls lie at least between two of them.
    """

    kind: str
    first: int
    times: int = 1
    each: int = 1


class Call(NamedTuple):
    """A file call: its number, its name, the kinds of fault that it can meet, and its path."""

    number: int
    name: str
    kinds: tuple[str, ...]
    path: str


class Outcome(NamedTuple):
    """What a command did.

    Attributes:
        code: its exit code.
        out: its standard output.
        err: its standard error.
        calls: those that met the fault; without one, all.
    """

    code: int
    out: str
    err: str
    calls: tuple[Call, ...]


def compile_injector(folder: Path) -> Path:
    """Compile the library into a folder and return its path."""
    library = folder / "injector.so"
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def run(library: Path, folder: Path, command: list[str], fault: Fault | None = None) -> Outcome:
    """Run a command in a folder, below which the calls of all its processes are counted.

    Raises:
        AssertionError: it hangs, or a process outlives it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        counts, log = Path(scratch) / "counts", Path(scratch) / "log"
        counts.write_bytes(bytes(16))
        log.touch()
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "LD_PRELOAD": str(library),
            "FAULT_ROOT": os.path.realpath(folder),
            "FAULT_COUNTS": str(counts),
            "FAULT_LOG": str(log),
            "FAULT_ERRNO": str(KINDS[fault.kind] if fault else 0),
            "FAULT_FIRST": str(fault.first if fault else 0),
            "FAULT_EACH": str(fault.each if fault else 1),
            "FAULT_TIMES": str(fault.times if fault else 0),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        code, out, err = _communicate(command, folder, environment)
        assert not (left := list(_of_build(counts))), f"outlived {command} with {fault}: {left}"
        return Outcome(code, out, err, tuple(_read_log(log)))


def _communicate(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=_LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{command} hangs") from None
    return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


def _of_build(counts: Path) -> Iterator[psutil.Process]:
    """Yield the processes that still count, after they had some time to end."""
    deadline = time.monotonic() + 10
    while found := [one for one in psutil.process_iter() if _counts_in(one, str(counts))]:
        if time.monotonic() > deadline:
            yield from found
            return
        time.sleep(0.05)


def _counts_in(process: psutil.Process, counts: str) -> bool:
    try:
        return bool(process.environ().get("FAULT_COUNTS") == counts)
    except psutil.Error:
        return False


def _read_log(log: Path) -> Iterator[Call]:
    for line in log.read_text(errors="surrogateescape").splitlines():
        number, name, kinds, path = re.fullmatch(r"(\d+) (\w+) (?:([A-Z,]+,) )?(.*)", line).groups()  # type: ignore[union-attr]
        yield Call(int(number), name, tuple((kinds or "").split(",")[:-1]), path)


def python(*arguments: str) -> list[str]:
    """Return a command that runs a module of Python's without the folder that it runs in among its modules."""
    return [sys.executable, "-P", "-m", *arguments]
