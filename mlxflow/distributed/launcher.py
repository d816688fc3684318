"""Start the ranks of a run: on this host as child processes, on others through ssh."""

import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import psutil

from mlxflow.distributed.backend_variables import variables_of
from mlxflow.distributed.hosts import Hostfile
from mlxflow.distributed.mpi_meeting import MpiHost, MpiMeeting
from mlxflow.distributed.rank import Rank
from mlxflow.distributed.rank_start import RankStart, free_ports
from mlxflow.distributed.remote_rank import RemoteRank, Remotes
from mlxflow.distributed.running_rank import RunningRank
from mlxflow.messages.errors import WorkflowError

_READ_BYTES = 1 << 16
_HERE = "127.0.0.1"


class Launch(NamedTuple):
    """How the ranks of a run are started.

    Attributes:
        command: program and arguments of every rank on this host.
        data: the standard input of every rank.
        size: number of ranks.
        backend: "ring", "nccl", "jaccl" or "mpi".
        reduction: see `Rank`.
        shards_optimizer: see `Rank`.
        shards_layers: see `Rank`.
        logs: a file for the output of each rank.
        open_log: opens one of them for writing.
        threads: of matrix products of each rank; 0 for one per processor.
        hosts: of the ranks; None if all are on this host.
        remotes: what ranks on other hosts are started with; None without any.
        too_many_rows: see `Rank`.
    """

    command: Sequence[str]
    data: bytes
    size: int
    backend: str
    reduction: str
    shards_optimizer: bool
    shards_layers: bool
    logs: Sequence[Path]
    open_log: Callable[[Path], BinaryIO]
    threads: int
    hosts: Hostfile | None
    remotes: Remotes | None
    too_many_rows: int = 0


class RankProcess(RunningRank):
    """A rank on this host.

    Args:
        launch: of all ranks.
        start: how to start this one.

    Attributes:
        process: its process.
    """

    def __init__(self, launch: Launch, start: RankStart) -> None:
        number = start.rank.number
        super().__init__(number, "", launch.logs[number], launch.open_log)
        self._beats, beats = os.pipe()
        self._output, output = os.pipe()
        self.pipes = {self._beats, self._output}
        try:
            self.process: subprocess.Popen[bytes] = start.run(beats, output)
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
        return self._take_beats(data)

    def signal(self, number: int) -> None:
        """Send a signal to the rank and the processes it started, unless it has ended."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):  # macOS refuses for a group of ended processes
                os.killpg(self.process.pid, number)

    @property
    def exit_code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    @property
    def is_stopped(self) -> bool:
        """Whether SIGSTOP or a debugger stopped the process."""
        with suppress(psutil.Error):
            return bool(psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED)
        return False

    def end(self) -> None:
        """Kill it if it still runs, and wait for its end."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Close the pipes and the log."""
        for pipe in tuple(self.pipes):
            os.close(pipe)
        self.pipes.clear()
        self._log.close()


def start_ranks(
    launch: Launch,
    ranks: list[RunningRank],
    held: ExitStack,
    *,
    stop_requested: Callable[[], bool],
    start: Callable[..., RankProcess],
) -> None:
    """Start all ranks: first the agents on other hosts, which check their versions and files, then every rank.

    Args:
        launch: how.
        ranks: gets each of them as soon as something of it runs.
        held: gets what must last as long as the ranks.
        stop_requested: whether to give up.
        start: starts a rank on this host: `RankProcess`.

    Raises:
        HostError: a rank on another host cannot be started.
        StopRequestedError: a stop was requested.
        WorkflowError: the first host is not this one.
    """
    _require_first_here(launch.hosts)
    remote = {
        number: RemoteRank(
            number,
            host,
            launch.remotes,
            log=(launch.logs[number], launch.open_log),
            stop_requested=stop_requested,
        )
        for number, host in enumerate(launch.hosts.hosts if launch.hosts and launch.remotes else ())
        if launch.remotes and not host.is_here
    }
    ranks += remote.values()
    for number, one in remote.items():
        count = launch.hosts.place_on_host(number)[1] if launch.hosts else 0
        one.prepare(launch.backend, count)
    hosts = list(_mpi_hosts(launch)) if launch.backend == "mpi" else []
    group = held.enter_context(MpiMeeting(hosts, stop_requested)).variables if hosts else ()
    addresses, key = list(_addresses(launch, remote)), secrets.token_hex(16)
    for number in range(launch.size):
        begin = _start_of(launch, number, addresses, key)
        if group:
            begin = begin._replace(environment=begin.environment | group[number])
        if number in remote:
            remote[number].begin(begin)
        else:
            ranks.append(start(launch, begin))
    ranks.sort(key=lambda one: one.number)


def _require_first_here(hosts: Hostfile | None) -> None:
    if hosts and not hosts.hosts[0].is_here:
        raise WorkflowError(
            f"{hosts.file}:{hosts.hosts[0].line}: entry 1: ssh = {hosts.hosts[0].ssh}: expected this machine, because "
            "rank 0 writes the artifacts. Put its entry first: under the name that hostname prints, or localhost."
        )


def _addresses(launch: Launch, remote: dict[int, RemoteRank]) -> Iterator[list[str]]:
    """Yield for each rank the addresses at which it can be reached."""
    if launch.hosts is None:
        yield from ([f"{_HERE}:{port}"] for port in free_ports(launch.size))
        return
    for number, host in enumerate(launch.hosts.hosts):
        if number in remote:
            ports = remote[number].ports
        else:
            try:
                ports = [free_ports(1, address)[0] for address in host.ips]
            except OSError as error:
                raise WorkflowError(
                    f"{launch.hosts.file}:{host.line}: entry {number + 1}: ips: cannot be used on this machine "
                    f"({error.strerror}). Write addresses that it has."
                ) from error
        yield [f"{address}:{port}" for address, port in zip(host.ips, ports, strict=True)]


def _mpi_hosts(launch: Launch) -> Iterator[MpiHost]:
    if launch.hosts is None or launch.remotes is None:
        yield from [MpiHost()] * launch.size
        return
    address = launch.hosts.hosts[0].ips[0]
    for host in launch.hosts.hosts:
        yield MpiHost(address=address) if host.is_here else MpiHost(host.ssh, launch.remotes.python, address)


def _start_of(launch: Launch, number: int, addresses: Sequence[Sequence[str]], key: str) -> RankStart:
    hosts = launch.hosts
    place, neighbours = hosts.place_on_host(number) if hosts else (number, launch.size)
    return RankStart(
        command=launch.command,
        data=launch.data,
        rank=Rank(
            number,
            launch.size,
            launch.backend,
            launch.reduction,
            shards_optimizer=launch.shards_optimizer,
            shards_layers=launch.shards_layers,
            too_many_rows=launch.too_many_rows,
        ),
        variables=variables_of(
            launch.backend, number, addresses, rdma=[host.rdma for host in hosts.hosts] if hosts else (), key=key
        ),
        environment=dict(hosts.environment) if hosts else {},
        place=place,
        neighbours=neighbours,
        threads=launch.threads,
        folder="",
    )
