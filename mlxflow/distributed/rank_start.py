"""Start a rank as a child process of this one, on whichever host this is."""

import os
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from mlxflow.device import child_processes
from mlxflow.distributed.backend_variables import Variables, visible_gpu
from mlxflow.distributed.core_sets import core_sets
from mlxflow.distributed.rank import Rank


class RankStart(NamedTuple):
    """How a rank is started.

    Attributes:
        command: program and arguments.
        data: its standard input.
        rank: its number, and what all ranks share.
        variables: of MLX's backend.
        environment: other variables.
        place: of the rank among those of its host.
        neighbours: the number of ranks of its host, itself included.
        threads: of its matrix products; 0 for one per processor.
        folder: to run in; empty for the present one.
    """

    command: Sequence[str]
    data: bytes
    rank: Rank
    variables: Variables
    environment: dict[str, str]
    place: int
    neighbours: int
    threads: int
    folder: str

    def run(self, beats: int, output: int) -> "subprocess.Popen[bytes]":
        """Start the rank, which writes to the given descriptors and ends with this process."""
        has_gpu = self.rank.backend == "nccl"
        cores = () if has_gpu else core_sets(self.neighbours, self.threads)[self.place]
        rank = self.rank._replace(beats=beats, cores=cores, sharing=1 if has_gpu else self.neighbours)
        variables = dict(self.environment) | self.variables.values | rank.environment()
        if has_gpu:
            variables["CUDA_VISIBLE_DEVICES"] = visible_gpu(self.place)
        files: list[int] = []
        try:
            for name, content in self.variables.files.items():
                files.append(_readable_once(content))
                variables[name] = f"/dev/fd/{files[-1]}"
            with tempfile.TemporaryFile() as data:
                data.write(self.data)
                data.seek(0)
                return child_processes.start(
                    self.command,
                    stdin=data,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    pass_fds=(beats, *files),
                    env=os.environ | variables,
                    cwd=self.folder or None,
                )
        finally:
            for descriptor in files:
                os.close(descriptor)


def _readable_once(content: str) -> int:
    """Return the reading end of a pipe with a content: MLX reads it once, and no file is left behind."""
    reading, writing = os.pipe()
    os.write(writing, content.encode())  # a hostfile of the most ranks fits into a pipe
    os.close(writing)
    return reading


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Return ports that no process uses now; another one may take them before they are bound.

    Args:
        count: how many.
        address: of this machine.

    Raises:
        OSError: it is no address of this machine.
    """
    sockets = [socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) for _ in range(count)]
    try:
        for one in sockets:
            one.bind((address, 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
