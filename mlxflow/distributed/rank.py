"""The place of a process in a distributed run, passed by the launcher in environment variables. Imports no MLX."""

import functools
import os
from collections.abc import Mapping
from typing import NamedTuple, Self

_RANK, _BEATS = "MLXFLOW_RANK", "MLXFLOW_BEATS_FD"


class Rank(NamedTuple):
    """The place of a process in a distributed run.

    Attributes:
        number: of the process, from 0; rank 0 writes the artifact.
        size: processes in the run.
        backend: "ring" or "nccl"; empty for a single process.
        reduction: "ordered" or "fast".
        beats: descriptor of the pipe for heartbeats; -1 for none.
    """

    number: int = 0
    size: int = 1
    backend: str = ""
    reduction: str = "ordered"
    beats: int = -1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.number == 0

    def environment(self) -> dict[str, str]:
        """Return the environment variables from which the process reads its place."""
        return {_RANK: f"{self.number} {self.size} {self.backend} {self.reduction}", _BEATS: str(self.beats)}

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Self | None:
        """Return the place that a launcher wrote into an environment; None if there is none."""
        if _RANK not in environment:
            return None
        number, size, backend, reduction = environment[_RANK].split(" ")
        return cls(int(number), int(size), backend, reduction, int(environment[_BEATS]))


#: A process that trains alone.
ALONE = Rank()


@functools.cache
def of_this_process() -> Rank:
    """Return the place of this process; its own child processes do not inherit it."""
    rank = Rank.read(os.environ)
    for name in (_RANK, _BEATS):
        os.environ.pop(name, None)
    if rank is None:
        return ALONE
    os.set_inheritable(rank.beats, False)
    return rank
