"""The agent of a rank on a host that ssh reached: `python -m mlxflow.workflow.remote_agent`.

It talks with the supervisor on the first host over its standard input and output; see `mlxflow.distributed.frames`. It
keeps a copy of the project's files that a rank reads, starts the rank there, and passes on its heartbeats and output.
The rank is killed when the standard input ends, when nothing arrives for too long, and when this process ends.
"""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import psutil

from mlxflow.distributed import frames
from mlxflow.distributed.backend_variables import Variables
from mlxflow.distributed.backends import count_gpus
from mlxflow.distributed.code_digest import code_digest
from mlxflow.distributed.rank import Rank
from mlxflow.distributed.rank_start import RankStart, free_ports
from mlxflow.storage import layout
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.user_folders import cache_folder

_TICK_SECONDS = 0.5
_READ_BYTES = 1 << 16

# The rank waits in its own writes while this much is on the way to the supervisor
_MAX_WAITING = 1 << 20

# A copy of a project that no run used for this long is removed
_KEPT_SECONDS = 30 * 24 * 3600


def versions() -> dict[str, str]:
    """Return what every host of a run must have alike, by its name in words."""
    return {"mlxflow": version("mlxflow"), "MLX": version("mlx"), "code": code_digest()}


def project_folder(project: str) -> Path:
    """Return the folder for the copy of a project, and remove copies that were not used for a month.

    Args:
        project: its name, without slashes.
    """
    top = cache_folder() / "remote"
    folder = top / PurePosixPath(project).name
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for other in top.iterdir():
        with suppress(OSError):
            if other.stat().st_mtime < time.time() - _KEPT_SECONDS:
                shutil.rmtree(other)
    return folder


class ProjectCopy:
    """A copy of the files that a rank reads.

    Args:
        folder: of the copy.
        files: their names relative to it, sizes in bytes and digests.
    """

    def __init__(self, folder: Path, files: list[tuple[str, int, str]]) -> None:
        for name, *_ in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name}: is outside of the project")
        self.folder = folder
        self._files = {name: (size, digest) for name, size, digest in files}
        self._receiving: tuple[str, int, BinaryIO] | None = None

    def missing(self) -> list[str]:
        """Return the names of files that are missing or differ, and remove every other file."""
        cache = folder_cache(self.folder)
        missing = []
        for name, (size, digest) in self._files.items():
            path = self.folder / name
            try:
                found = path.stat().st_size == size and cache.digests(path).content == digest
            except (OSError, ValueError):
                found = False
            if not found:
                missing.append(name)
        cache.save()
        kept = {self.folder / name for name in self._files} | {layout.state_folder(self.folder) / layout.DIGESTS}
        for path in sorted(self.folder.rglob("*"), reverse=True):  # files before their folders
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # it is not empty
                    path.rmdir()
            elif path not in kept:
                path.unlink()
        return missing

    def begin_file(self, name: str) -> None:
        """Begin to receive a file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._receiving = (name, self._files[name][0], _partial(path).open("wb"))
        self.add(b"")

    def add(self, data: bytes) -> None:
        """Take the next bytes of the file.

        Raises:
            ValueError: the file is not what was announced.
        """
        name, left, file = cast("tuple[str, int, BinaryIO]", self._receiving)
        file.write(data)
        left -= len(data)
        self._receiving = (name, left, file)
        if left > 0:
            return
        file.close()
        path = self.folder / name
        _partial(path).replace(path)
        self._receiving = None
        if folder_cache(self.folder).digests(path).content != self._files[name][1]:
            path.unlink()
            raise ValueError(f"{name}: changed while it was copied")

    @property
    def is_receiving(self) -> bool:
        """Whether a file has begun and not ended."""
        return self._receiving is not None


def folder_cache(folder: Path) -> DigestCache:
    """Return the digests of the files of a copy that are already known."""
    state = layout.state_folder(folder)
    state.mkdir(parents=True, exist_ok=True)
    return DigestCache(state / layout.DIGESTS)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


class _Agent:
    """Follows one supervisor, until its connection ends."""

    def __init__(self, reading: int, writing: int) -> None:
        self._input = reading
        self._outbox = frames.Outbox(writing)
        self._decoder = frames.Decoder()
        self._copy: ProjectCopy | None = None
        self._missing: list[str] = []
        self._ports: list[int] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._kinds: dict[int, bytes] = {}
        self._ended = False
        self._stopped = False
        self._heard = time.monotonic()
        self._silence_seconds = 3600.0

    def follow(self) -> None:
        """Follow the supervisor until its end."""
        try:
            while self._step():
                pass
        finally:
            self._signal(signal.SIGKILL)

    def _step(self) -> bool:
        """Wait for something to do and do it; return whether to continue."""
        poll = select.poll()
        poll.register(self._input, select.POLLIN | select.POLLHUP)
        if len(self._outbox):
            poll.register(1, select.POLLOUT)
        if len(self._outbox) < _MAX_WAITING:
            for pipe in self._kinds:
                poll.register(pipe, select.POLLIN | select.POLLHUP)
        for pipe, _ in poll.poll(_TICK_SECONDS * 1000):
            if pipe in self._kinds:
                self._pass_on(pipe)
            elif pipe == self._input:
                data = os.read(pipe, _READ_BYTES)
                if not data:
                    return False
                for kind, content in self._decoder.add(data):
                    self._take(kind, content)
                self._heard = time.monotonic()
        self._outbox.flush()
        self._look_at_rank()
        return time.monotonic() < self._heard + self._silence_seconds

    def _take(self, kind: bytes, content: bytes) -> None:
        try:
            if kind == frames.PROJECT:
                self._open(json.loads(content))
            elif kind == frames.FILE:
                self._copied.begin_file(json.loads(content))
                self._after_content()
            elif kind == frames.CONTENT:
                self._copied.add(content)
                self._after_content()
            elif kind == frames.RUN:
                self._run(json.loads(content))
            elif kind == frames.SIGNAL:
                self._signal(int(content))
        except (OSError, ValueError) as error:
            words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            self._outbox.add(frames.encode(frames.REFUSED, words.encode(errors="replace")))

    @property
    def _copied(self) -> ProjectCopy:
        return cast("ProjectCopy", self._copy)

    def _open(self, request: dict[str, Any]) -> None:
        self._silence_seconds = request["silence_seconds"]
        gpus = count_gpus()
        if request["backend"] == "nccl" and gpus < request["ranks"]:
            raise ValueError(f"the backend nccl needs {request['ranks']} NVIDIA GPUs, and {gpus} can be used there")
        self._ports = [_free_port(address) for address in request["ips"]]
        files = [(name, size, digest) for name, size, digest in request["files"]]
        self._copy = ProjectCopy(project_folder(request["project"]), files)
        self._missing = self._copy.missing()
        self._answer()

    def _after_content(self) -> None:
        if not self._copied.is_receiving:
            self._missing.pop(0)
            if not self._missing:
                self._answer()

    def _answer(self) -> None:
        self._outbox.add(frames.encode_json(frames.WANTED, {"names": self._missing, "ports": self._ports}))

    def _run(self, request: dict[str, Any]) -> None:
        request |= {
            "command": [sys.executable, *request["command"]],
            "data": base64.b64decode(request["data"]),
            "rank": Rank(*request["rank"]),
            "variables": Variables(*request["variables"]),
            "folder": str(self._copied.folder),
        }
        beats, writing = os.pipe()
        output, printing = os.pipe()
        self._kinds = {beats: frames.BEATS, output: frames.OUTPUT}
        try:
            self._process = RankStart(**request).run(writing, printing)
        finally:
            os.close(writing)
            os.close(printing)

    def _pass_on(self, pipe: int) -> None:
        """Send what is in a pipe of the rank."""
        data = os.read(pipe, _READ_BYTES)
        if data or self._kinds[pipe] == frames.OUTPUT:
            self._outbox.add(frames.encode(self._kinds[pipe], data))
        if not data:
            os.close(pipe)
            del self._kinds[pipe]

    def _look_at_rank(self) -> None:
        """Send whether the rank was stopped or has ended, when that changes."""
        if self._process is None or self._ended:
            return
        code = self._process.poll()
        if code is None:
            is_stopped = self._stopped
            with suppress(psutil.Error):
                is_stopped = psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED
            if is_stopped != self._stopped:
                self._stopped = is_stopped
                self._outbox.add(frames.encode(frames.STOPPED, b"1" if is_stopped else b"0"))
            return
        poll = select.poll()
        for pipe in self._kinds:
            poll.register(pipe, select.POLLIN | select.POLLHUP)
        while ready := poll.poll(0):
            for pipe, _ in ready:
                self._pass_on(pipe)
                if pipe not in self._kinds:
                    poll.unregister(pipe)
        self._ended = True
        self._outbox.add(frames.encode(frames.ENDED, str(code).encode()))

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def _free_port(address: str) -> int:
    try:
        return free_ports(1, address)[0]
    except OSError as error:
        raise ValueError(f"ips: {address} cannot be used there ({error.strerror})") from error


def main() -> None:
    """Greet the supervisor and follow its orders."""
    os.environ["PYTHONSAFEPATH"] = "1"  # of the rank
    greeting = frames.GREETING + json.dumps(versions()).encode() + b"\n"
    os.write(1, b"\n" + greeting)  # what a shell's profile printed may have no end of line
    with suppress(BrokenPipeError):
        _Agent(0, 1).follow()


if __name__ == "__main__":
    main()
