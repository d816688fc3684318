"""A rank on another host: ssh starts an agent there, which starts the rank and ends it when the connection ends.

The supervisor and the agent exchange frames over the pipes of ssh. The agent keeps a copy of the files that a rank
reads, compared by digest before each start. Whatever ends the supervisor or the connection also ends the rank: the
agent sees the end of its input, or hears nothing for `SILENCE_SECONDS`.
"""

import base64
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mlxflow.distributed import frames
from mlxflow.distributed.heartbeat import Failure
from mlxflow.distributed.hosts import Host
from mlxflow.distributed.rank_start import RankStart
from mlxflow.distributed.running_rank import RunningRank
from mlxflow.distributed.ssh_link import LinkError, SshLink
from mlxflow.messages import terminal
from mlxflow.messages.byte_sizes import show_bytes

#: An agent that hears nothing for this long ends its rank.
SILENCE_SECONDS = 60.0

# Between two frames that say that the supervisor lives
_ALIVE_SECONDS = 5.0


class HostError(Exception):
    """A rank on another host could not be started.

    Args:
        number: of the rank.
        reason: in words.
        is_final: whether another attempt would fail in the same way.
    """

    def __init__(self, number: int, reason: str, *, is_final: bool) -> None:
        super().__init__(reason)
        self.number = number
        self.is_final = is_final


class SharedFile(NamedTuple):
    """A file that every rank reads.

    Attributes:
        name: relative to the project's folder.
        path: of the file here.
        size: in bytes.
        digest: of its content.
    """

    name: str
    path: Path
    size: int
    digest: str


class Remotes(NamedTuple):
    """What ranks on other hosts are started with.

    Attributes:
        python: the interpreter there.
        agent: the module that starts the rank there.
        arguments: of that interpreter, for the rank.
        project: names the copy of the project's files there.
        versions: by what has them, in words, such as "mlxflow"; the other host must have the same.
        list_files: returns the files that a rank reads now.
        silence_seconds: see `SILENCE_SECONDS`.
    """

    python: str
    agent: str
    arguments: Sequence[str]
    project: str
    versions: Mapping[str, str]
    list_files: Callable[[], Sequence[SharedFile]]
    silence_seconds: float = SILENCE_SECONDS


class RemoteRank(RunningRank):
    """A rank on another host; it is created with ssh running, then prepared, then begun.

    Args:
        number: of the rank.
        host: its entry in the hostfile.
        remotes: what it is started with.
        log: the file for its output, and how to open it.
        stop_requested: whether to give up.

    Attributes:
        ports: free ones there, one for each address; known when it is prepared.
        link: to its agent.
    """

    def __init__(
        self,
        number: int,
        host: Host,
        remotes: Remotes,
        *,
        log: tuple[Path, Callable[[Path], BinaryIO]],
        stop_requested: Callable[[], bool],
    ) -> None:
        super().__init__(number, host.ssh, *log)
        self.ports: list[int] = []
        self._host = host
        self._remotes = remotes
        self._code: int | None = None
        self._is_stopped = False
        self._said = time.monotonic()
        try:
            command = [remotes.python, "-P", "-u", "-m", remotes.agent]
            self.link = SshLink(host.ssh, command, self._log, stop_requested)
        except LinkError as error:
            self._log.close()
            raise HostError(number, str(error), is_final=error.is_final) from error
        self.pipes = self.link.pipes

    def prepare(self, backend: str, num_ranks: int) -> None:
        """Compare the versions, and send the files that the other host lacks.

        Args:
            backend: nccl needs GPUs.
            num_ranks: on that host.

        Raises:
            HostError: the host cannot be used.
            StopRequestedError: a stop was requested.
        """
        try:
            self._require_versions(self.link.greeting())
            self._send_files(backend, num_ranks)
        except LinkError as error:
            raise HostError(self.number, str(error), is_final=error.is_final) from error

    def _send_files(self, backend: str, num_ranks: int) -> None:
        files = self._remotes.list_files()
        request = {
            "project": self._remotes.project,
            "files": [[one.name, one.size, one.digest] for one in files],
            "ips": self._host.ips,
            "backend": backend,
            "ranks": num_ranks,
            "silence_seconds": self._remotes.silence_seconds,
        }
        self.link.post_all(frames.encode_json(frames.PROJECT, request))
        wanted = self._answer()
        self.ports = wanted["ports"]
        missing = [one for one in files if one.name in set(wanted["names"])]
        if not missing:
            return
        terminal.say(f"{self.name}: copies {len(missing)} files, {show_bytes(sum(one.size for one in missing))}")
        for one in missing:
            self.link.post_all(frames.encode_json(frames.FILE, one.name))
            with one.path.open("rb") as file:
                while data := file.read(frames.MAX_BYTES):
                    self.link.post_all(frames.encode(frames.CONTENT, data))
        self._answer()

    def _answer(self) -> dict[str, Any]:
        """Return the agent's answer about files."""
        for kind, content in self.link.received():
            if kind == frames.WANTED:
                return dict(json.loads(content))
            self._take(kind, content)
            if self.failure is not None:
                break
        reason = self.failure.lines[0] if self.failure else "no answer"
        raise HostError(self.number, f"{self._host.ssh}: {reason}", is_final=True)

    def begin(self, start: RankStart) -> None:
        """Start the rank, which `prepare` has prepared.

        Args:
            start: how; its command is for this host.

        Raises:
            HostError: the connection was lost.
        """
        fields: dict[str, Any] = start._asdict() | {
            "command": list(self._remotes.arguments),
            "data": base64.b64encode(start.data).decode(),
            "variables": [start.variables.values, start.variables.files],
        }
        try:
            self.link.post_all(frames.encode_json(frames.RUN, fields))
        except LinkError as error:
            raise HostError(self.number, str(error), is_final=error.is_final) from error

    def read(self, pipe: int) -> bool:
        """Take what is in a pipe; return whether it is a sign of life from the training."""
        is_alive = False
        for kind, content in self.link.read(pipe):
            is_alive |= self._take(kind, content)
        return is_alive

    def _take(self, kind: bytes, content: bytes) -> bool:
        """Take a frame; return whether it is a sign of life from the training."""
        if kind == frames.BEATS:
            return self._take_beats(content)
        if kind == frames.OUTPUT:
            self._show(content)
        elif kind == frames.STOPPED:
            self._is_stopped = content == b"1"
        elif kind == frames.ENDED:
            self._code = int(content)
        elif kind == frames.REFUSED:
            self.failure = Failure("host", (content.decode(errors="replace"),), 1)
            self._code = 1
        return False

    def signal(self, number: int) -> None:
        """Send a signal to the rank and the processes it started, unless it has ended."""
        self._post_if_connected(frames.encode(frames.SIGNAL, str(int(number)).encode()))

    def tick(self) -> None:
        """Send the agent a sign of life."""
        super().tick()
        is_due = time.monotonic() > self._said + _ALIVE_SECONDS and not self.link.is_congested
        if is_due:
            self._said = time.monotonic()
        self._post_if_connected(frames.encode(frames.ALIVE) if is_due else b"")

    def _post_if_connected(self, frame: bytes) -> None:
        if self._code is None and self.link.exit_code is None:
            with suppress(LinkError):
                self.link.post(frame)

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._code is None and (code := self.link.exit_code) is not None:
            self._code = code or 1
            words = f" ({self.link.complaint})" if self.link.complaint else ""
            self.failure = Failure("host", (f"the connection was lost{words}",), 1)
        return self._code

    @property
    def is_stopped(self) -> bool:
        """Whether SIGSTOP or a debugger stopped the process."""
        return self._is_stopped

    def end(self) -> None:
        """Kill it if it still runs, and wait for the agent's end."""
        self.link.end(self._take)

    def close(self) -> None:
        """Close the pipes and the log."""
        self.link.close()
        self._log.close()

    def _require_versions(self, theirs: Mapping[str, str]) -> None:
        ours = self._remotes.versions
        other = [name for name in ours if theirs.get(name) != ours[name]]
        other = [name for name in other if name != "code"] or other  # other versions have other code
        if not other:
            return
        there, here = (
            " and ".join(f"{name} {found.get(name, '')[:12]}".strip() for name in other) for found in (theirs, ours)
        )
        reason = f"{self._host.ssh} has {there}, and this host has {here}. Install the same there."
        raise HostError(self.number, reason, is_final=True)
