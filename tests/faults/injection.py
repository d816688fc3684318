"""doit with a library preloaded that makes chosen file calls below a folder fail, do half, or end the process."""

import errno
import fcntl
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import psutil

SOURCE = Path(__file__).with_name("injector.c")

#: What the library takes for FAULT_ERRNO, by the names that it writes into its log.
KINDS = {
    "KILL": -1,
    "HALF": -2,
    **{name: getattr(errno, name) for name in ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENFILE", "EINTR")},
    **{name: getattr(errno, name) for name in ("EACCES", "ELOOP", "ENAMETOOLONG")},
}

#: The kinds that the library knows which calls can meet.
TRIED_AT_EVERY_CALL = ("KILL", "HALF", "EIO", "ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ENFILE", "EINTR")

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
    """A file call: its number, its process, its name, the kinds of fault that it can meet, and its path."""

    number: int
    process: int
    name: str
    kinds: tuple[str, ...]
    path: str

    @property
    def changes_the_disk(self) -> bool:
        """Whether a process that is killed after it leaves something else than one that is killed before it."""
        return "EROFS" in self.kinds or self.name == "write"


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


class Injector:
    """Runs doit with the library in all its processes.

    Most commands are run by a process that has imported doit and forks for each; `forking` has the reason.

    Args:
        folder: for the library.
    """

    def __init__(self, folder: Path) -> None:
        self.library = folder / "injector.so"
        options = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC"]
        subprocess.run(["cc", *options, "-o", self.library, SOURCE, "-ldl"], check=True)
        self._server: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End the process that forks."""
        if self._server:
            self._server.communicate()

    def run(self, folder: Path, *arguments: str, fault: Fault | None = None, fresh: bool = False) -> Outcome:
        """Run doit in a folder, below which the calls of all its processes are counted.

        Args:
            folder: the project.
            arguments: of doit.
            fault: what some calls meet; None: nothing.
            fresh: start an interpreter for it and for each of its stages.

        Raises:
            AssertionError: it hangs, or a process outlives it.
        """
        with tempfile.TemporaryDirectory() as scratch:
            counts, log, out, err = (Path(scratch) / name for name in ("counts", "log", "out", "err"))
            counts.write_bytes(bytes(16))
            for file in (log, out, err):
                file.touch()
            environment = self._environment() | {
                "FAULT_ROOT": os.path.realpath(folder),
                "FAULT_COUNTS": str(counts),
                "FAULT_LOG": str(log),
                "FAULT_ERRNO": str(KINDS[fault.kind] if fault else 0),
                "FAULT_FIRST": str(fault.first if fault else 0),
                "FAULT_EACH": str(fault.each if fault else 1),
                "FAULT_TIMES": str(fault.times if fault else 0),
                "XDG_CACHE_HOME": str(folder / "cache"),
                "HF_HUB_OFFLINE": "1",
            }
            run = _start if fresh else self._fork
            code = run(folder, arguments, environment, out, err)
            assert not (left := _of_build(counts)), f"outlived {arguments} with {fault}: {left}"
            printed, said = (file.read_bytes().decode(errors="replace") for file in (out, err))
            return Outcome(code, printed, said, tuple(_read_log(log)))

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {**kept, "LD_PRELOAD": str(self.library), "PYTHONDONTWRITEBYTECODE": "1"}

    def _fork(
        self, folder: Path, arguments: tuple[str, ...], environment: Mapping[str, str], out: Path, err: Path
    ) -> int:
        server = self._server = self._server or self._start_server()
        assert server.stdin
        assert server.stdout
        files = {"folder": str(folder), "out": str(out), "err": str(err)}
        command = {**files, "arguments": arguments, "environment": dict(environment)}
        server.stdin.write(json.dumps(command).encode() + b"\n")
        process = int(_read_line(server.stdout))
        if not select.select([server.stdout], [], [], _LONGEST_SECONDS)[0]:
            os.killpg(process, signal.SIGKILL)
            _read_line(server.stdout)
            raise AssertionError(f"{arguments} hangs")
        return int(_read_line(server.stdout))

    def _start_server(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", str(SOURCE.with_name("forking.py"))]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, env=self._environment())


def _read_line(stream: IO[bytes]) -> bytes:
    """Return a line of an unbuffered stream; the next one is left for `select` to see."""
    line = b""
    while not line.endswith(b"\n"):
        read = stream.read(1)
        assert read, "the process that forks ended"
        line += read
    return line


def _start(folder: Path, arguments: tuple[str, ...], environment: Mapping[str, str], out: Path, err: Path) -> int:
    command = [sys.executable, "-P", "-m", "doit", *arguments]
    with out.open("wb") as output, err.open("wb") as errors:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    try:
        return process.wait(_LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"{arguments} hangs") from None


def _of_build(counts: Path) -> list[psutil.Process]:
    """Return the processes that still count, after they had some time to end."""
    deadline = time.monotonic() + 10
    with counts.open("rb") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
            else:
                return []
    return [one for one in psutil.process_iter() if _has_open(one, str(counts))]


def _has_open(process: psutil.Process, path: str) -> bool:
    try:
        return any(file.path == path for file in process.open_files())
    except psutil.Error:
        return False


def _read_log(log: Path) -> Iterator[Call]:
    for line in log.read_text(errors="surrogateescape").splitlines():
        matched = re.fullmatch(r"(\d+) (\d+) (\w+) (?:([A-Z,]+,) )?(.*)", line)
        assert matched, line
        number, process, name, kinds, path = matched.groups()
        yield Call(int(number), int(process), name, tuple((kinds or "").split(",")[:-1]), path)
