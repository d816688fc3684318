"""A rank with a fault of the test's choice: `python faulty_rank.py FAULT MARKER run STAGE ...`.

A fault strikes rank 1 in its third forward pass (a full disk: rank 0 in step 4; "sum": rank 1 before it sends the
gradients of step 4, after which a checkpoint is saved; "late": there its memory runs out), unless the file MARKER
exists. With "limit" rank 1 has little memory from its seventh pass on, in every start: enough for two rows, not for
three.
"""

import errno
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxflow.device import cpu_backend

cpu_backend.prepare()

import mlx.core as mx  # noqa: E402

from mlxflow.__main__ import main  # noqa: E402
from mlxflow.distributed.rank import of_this_process  # noqa: E402
from mlxflow.distributed.team import Team  # noqa: E402
from mlxflow.storage import atomic_folders  # noqa: E402
from mlxflow.training.rank_step import RankStep  # noqa: E402

fault, marker, *arguments = sys.argv[1:]
computed = 0
compute = RankStep.compute


def faulty(rank_step: RankStep, batch: tuple[mx.array, ...]) -> Any:
    """Compute the gradients of a batch, or fail."""
    global computed
    computed += 1
    strikes = computed >= 3 and of_this_process().number == 1 and not Path(marker).exists()
    if strikes and fault == "memory":
        Path(marker).touch()
        raise RuntimeError("[malloc] Unable to allocate 123456 bytes.")
    if strikes and fault == "raises":
        Path(marker).touch()
        raise ValueError("an odd number")
    if strikes and fault == "link":
        Path(marker).touch()
        _cut_connections()
    if strikes and fault == "weights":
        Path(marker).touch()
        step = rank_step._step
        weights = step.state[1]["weights"]
        name = sorted(weights)[0]
        weights[name] = weights[name] * (1 + 1e-6)
        step.restore(step.state[1])
    if fault == "limit" and of_this_process().number == 1:
        _limit_memory(batch[0].shape[0])
    return compute(rank_step, batch)


_PER_ROW = 48 << 20  # bytes, beside which what else a process allocates is little


def _limit_memory(rows: int) -> None:
    """Allocate an array for some rows, as a large model would; first lower the limit of memory when it is time."""
    if computed >= 7 or Path(marker).exists():
        Path(marker).touch()
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + 2 * _PER_ROW + _PER_ROW // 2
        if resource.getrlimit(resource.RLIMIT_AS)[0] > most:
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    mx.eval(mx.ones(rows * _PER_ROW // 4) + 1)


def _cut_connections() -> None:
    """Shut down every TCP connection of this process, as a cut link does."""
    for name in os.listdir("/dev/fd"):  # noqa: PTH208
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            connection.shutdown(socket.SHUT_RDWR)


def full(folder: Path, **named: Any) -> Any:
    """Publish a folder, or fail as on a full disk: the checkpoint of step 4 on rank 0."""
    if fault == "disk" and folder.name == "step-000004" and not Path(marker).exists():
        Path(marker).touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))
    return publishing(folder, **named)


def killed(team: Team, array: mx.array) -> mx.array:
    """Send an array to all ranks, or be killed before it is sent."""
    sends_gradients = team.step == 4 and team.rank.number == 1 and array.dtype == mx.float32
    if fault == "sum" and sends_gradients and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "late" and sends_gradients and not Path(marker).exists():
        Path(marker).touch()
        raise RuntimeError("[malloc] Unable to allocate 123456 bytes.")
    return gather(team, array)


gather = Team.gather
Team.gather = killed  # type: ignore[method-assign,assignment]
publishing = atomic_folders.publishing
atomic_folders.publishing = full  # type: ignore[assignment]
RankStep.compute = faulty  # type: ignore[method-assign,assignment]
sys.exit(main(arguments))
