"""Start the ranks of a run as child processes: addresses, backend variables, heartbeats, and prefixed output."""

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import psutil

from mlxflow.device import child_processes
from mlxflow.distributed.heartbeat import Beat, Failure, read_message
from mlxflow.distributed.rank import Rank
from mlxflow.messages import terminal
from mlxflow.messages.os_errors import naming

_HOST = "127.0.0.1"
_READ_BYTES = 1 << 16


class Launch(NamedTuple):
    """How the ranks of a run are started.

    Attributes:
        command: program and arguments of every rank.
        data: the standard input of every rank.
        size: number of ranks.
        backend: "ring" or "nccl".
        reduction: see `Rank`.
        logs: a file for the output of each rank.
        open_log: opens one of them for writing.
        find_ports: returns free ports of this machine, one for each rank.
    """

    command: Sequence[str]
    data: bytes
    size: int
    backend: str
    reduction: str
    logs: Sequence[Path]
    open_log: Callable[[Path], BinaryIO]
    find_ports: Callable[[int], list[int]]


def free_ports(count: int) -> list[int]:
    """Return ports that no process uses now; another one may take them before they are bound."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((_HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


class RankProcess:
    """A running rank.

    Args:
        launch: how to start it.
        number: of the rank.
        ports: of all ranks.

    Attributes:
        number: of the rank.
        process: its process.
        beat: what it does.
        failure: why it is about to end; None while it runs well.
        pipes: descriptors to read with `read`, until each has ended.
    """

    def __init__(self, launch: Launch, number: int, ports: Sequence[int]) -> None:
        self.number = number
        self.beat = Beat()
        self.failure: Failure | None = None
        self._messages = b""
        self._line = b""
        self._beats, beats = os.pipe()
        self._output, output = os.pipe()
        self._log = launch.open_log(launch.logs[number])
        self._log_name = launch.logs[number]
        self.pipes = {self._beats, self._output}
        try:
            self.process: subprocess.Popen[bytes] = _start(launch, number, ports, beats, output)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(beats)
            os.close(output)

    def read(self, pipe: int) -> bool:
        """Take what is in a pipe; return whether it is a sign of life from the training."""
        data = os.read(pipe, _READ_BYTES)
        if not data:
            os.close(pipe)
            self.pipes.discard(pipe)
        if pipe == self._output:
            self._show(data)
            return False
        *lines, self._messages = (self._messages + data).split(b"\n")
        for line in lines:
            message = read_message(line)
            if isinstance(message, Beat):
                self.beat = message
            elif message is not None:
                self.failure = message
        return bool(lines)

    def _show(self, data: bytes) -> None:
        """Print whole lines with the rank in front, and log them."""
        with naming(self._log_name):
            self._log.write(data)
            self._log.flush()
        *lines, self._line = (self._line + data).split(b"\n")
        if not data and self._line:
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            terminal.say(f"rank {self.number}: {line.decode(errors='backslashreplace')}")

    def signal(self, number: int) -> None:
        """Send a signal to the rank and the processes it started, unless it has ended."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):  # macOS refuses for a group of ended processes
                os.killpg(self.process.pid, number)

    @property
    def is_training(self) -> bool:
        """Whether it runs and its training is not over."""
        return self.process.poll() is None and not self.beat.is_done

    @property
    def is_stopped(self) -> bool:
        """Whether SIGSTOP or a debugger stopped the process."""
        with suppress(psutil.Error):
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)
        return False

    def close(self) -> None:
        """Close the pipes and the log."""
        for pipe in tuple(self.pipes):
            os.close(pipe)
        self.pipes.clear()
        self._log.close()


def _start(launch: Launch, number: int, ports: Sequence[int], beats: int, output: int) -> "subprocess.Popen[bytes]":
    """Start a rank that writes to the given descriptors."""
    rank = Rank(number, launch.size, launch.backend, launch.reduction, beats)
    hosts, variables = _backend(launch.backend, number, ports)
    try:
        with tempfile.TemporaryFile() as data:
            data.write(launch.data)
            data.seek(0)
            return child_processes.start(
                launch.command,
                stdin=data,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(beats, *hosts),
                env=os.environ | rank.environment() | variables,
            )
    finally:
        for descriptor in hosts:
            os.close(descriptor)


def _backend(backend: str, number: int, ports: Sequence[int]) -> tuple[tuple[int, ...], dict[str, str]]:
    """Return descriptors to pass to a rank, and the environment variables from which MLX reads its group."""
    variables = {"MLX_RANK": str(number), "MLX_WORLD_SIZE": str(len(ports))}
    if backend == "nccl":
        gpu = _visible_gpu(number)
        return (), variables | {"NCCL_HOST_IP": _HOST, "NCCL_PORT": str(ports[0]), "CUDA_VISIBLE_DEVICES": gpu}
    reading, writing = os.pipe()  # read once, when the rank joins the group: no file is left behind
    os.write(writing, json.dumps([[f"{_HOST}:{port}"] for port in ports]).encode())
    os.close(writing)
    return (reading,), variables | {"MLX_HOSTFILE": f"/dev/fd/{reading}"}


def _visible_gpu(number: int) -> str:
    """Return the GPU of a rank, among those that the user left visible."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[number] if visible else str(number)
