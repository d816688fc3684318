"""The place of a process in a distributed run, passed by the launcher in environment variables. Imports no MLX."""

import functools
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple, Self

#: The most processes of a run.
MAX_PROCESSES = 256

#: What the backend of a workflow may be.
BACKENDS = ("auto", "ring", "nccl", "jaccl", "mpi")

#: Backends that can give each rank its part of a sum alone (reduce-scatter).
SCATTERING = ("nccl", "jaccl")

_RANK, _BEATS = "MLXFLOW_RANK", "MLXFLOW_BEATS_FD"


class Rank(NamedTuple):
    """The place of a process in a distributed run.

    Attributes:
        number: of the process, from 0; rank 0 writes the artifact.
        size: processes in the run.
        backend: "ring", "nccl", "jaccl" or "mpi"; empty for a single process.
        reduction: "ordered" or "fast".
        beats: descriptor of the pipe for heartbeats; -1 for none.
        sharing: ranks that share this one's device and its memory, itself included.
        cores: the processors it may run on; empty for all.
        shards_optimizer: whether each rank keeps a part of the optimizer's state.
        shards_layers: whether each rank keeps a part of the weights of layers, and of their state.
        too_many_rows: of a forward pass, which ran out of memory in an earlier start; 0 for none.
    """

    number: int = 0
    size: int = 1
    backend: str = ""
    reduction: str = "ordered"
    beats: int = -1
    sharing: int = 1
    cores: tuple[int, ...] = ()
    shards_optimizer: bool = False
    shards_layers: bool = False
    too_many_rows: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.number == 0

    def environment(self) -> dict[str, str]:
        """Return the environment variables from which the process reads its place."""
        cores = ",".join(map(str, self.cores))
        shards = f"{int(self.shards_optimizer)}{int(self.shards_layers)}"
        place = f"{self.number} {self.size} {self.backend} {self.reduction} {self.sharing} {cores} {shards}"
        place += f" {self.too_many_rows}"
        return {_RANK: place, _BEATS: str(self.beats)}

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self | None:
        """Return the place that a launcher wrote into an environment; None if there is none."""
        if _RANK not in environment:
            return None
        number, size, backend, reduction, sharing, cores, shards, rows = environment[_RANK].split(" ")
        allowed = tuple(int(core) for core in cores.split(",") if core)
        beats = int(environment[_BEATS])
        optimizer, layers = (one == "1" for one in shards)
        place = (int(number), int(size), backend, reduction, beats, int(sharing), allowed)
        return cls(*place, shards_optimizer=optimizer, shards_layers=layers, too_many_rows=int(rows))


#: A process that trains alone.
ALONE = Rank()


@functools.cache
def of_this_process() -> Rank:
    """Return the place of this process; its own child processes do not inherit it.

    The first call limits the process to its processors, so it comes before any thread of MLX or of a BLAS starts.
    """
    rank = Rank.read(os.environ)
    for name in (_RANK, _BEATS):
        os.environ.pop(name, None)
    if rank is None:
        return ALONE
    os.set_inheritable(rank.beats, False)
    if rank.cores and sys.platform == "linux":
        with suppress(OSError):  # they were taken from this user meanwhile
            os.sched_setaffinity(0, rank.cores)
    return rank
