"""The ranks of a run as one of them sees it: the collectives, in one fixed order, and the comparison of their state.

Collectives carry no tags: ranks that call them in different orders get wrong sums without an error. So all of them run
on one stream, in the order of the calls, and each exchange of numbers begins with its name, which is compared.
"""

import functools
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlxflow.device import cpu_backend
from mlxflow.distributed.backend_variables import MEETING
from mlxflow.distributed.heartbeat import Heart
from mlxflow.distributed.number_exchange import Meeting, NumberExchange
from mlxflow.distributed.rank import ALONE, SCATTERING, Rank
from mlxflow.distributed.rank import of_this_process as place_of_this_process
from mlxflow.messages.errors import StageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class JoinError(RuntimeError):
    """The ranks could not connect to each other."""


class Team:
    """The ranks of a distributed run; of a single process, the exchanges return its own values.

    Args:
        rank: the place of this process.
        group: of MLX; None for a single process.
        numbers: exchanges what the host waits for; None to use the group.

    Attributes:
        rank: the place of this process.
        heart: sends heartbeats.
        step: the update that this rank works on, for heartbeats and messages; -1 before the training.
        batch_size: rows of the forward passes of that update, for heartbeats; 0 outside of updates.
        waited_seconds: time of all exchanges so far: for the device, and for the slowest rank.
    """

    def __init__(
        self,
        rank: Rank,
        group: "mx.distributed.Group | None",
        numbers: NumberExchange | None = None,
    ) -> None:
        self.rank = rank
        self.heart = Heart(rank.beats)
        self.step = -1
        self.batch_size = 0
        self.waited_seconds = 0.0
        self._group = group
        self._stream = None if group is None else _communication_stream(rank.backend)
        self._numbers = numbers

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.rank.size

    def beat(self, doing: str, *, waits: bool = False) -> None:
        """Send what this rank does from now on, and whether it needs other ranks for that, to the supervisor."""
        self.heart.beat(self.step, doing, waits=waits, batch_size=self.batch_size)

    def exchange(self, what: str, numbers: Sequence[int]) -> "NDArray[np.int64]":
        """Return the numbers of all ranks, (number of ranks, count); waits for them.

        Args:
            what: name of the exchange, the same on all ranks.
            numbers: as many on all ranks, of 64 bits.

        Raises:
            StageError: a rank is at another exchange, or in another step.
        """
        if self._group is None:
            return np.array([numbers], np.int64)
        self.beat(what, waits=True)
        begin = time.perf_counter()
        everyone = self._gather_numbers(np.array([[_number_of(what), self.step, *numbers]], np.int64))
        self.waited_seconds += time.perf_counter() - begin
        self.beat(f"after: {what}")
        names = everyone[:, 0]
        for number in range(1, self.size):
            if names[number] != names[0] or everyone[number, 1] != everyone[0, 1]:
                raise StageError(
                    f"rank {number} is at step {everyone[number, 1]} where rank 0 is at step {everyone[0, 1]}, or in "
                    f"another part of it ({what}, as rank {self.rank.number} sees it). Run it again: it resumes from "
                    "the last checkpoint."
                )
        return everyone[:, 2:]

    def gather(self, array: mx.array) -> mx.array:
        """Return the arrays of all ranks, concatenated by rank along the first axis; lazy.

        Args:
            array: of the same shape and dtype on all ranks.
        """
        if self._group is None:
            return array
        return mx.distributed.all_gather(array, group=self._group, stream=self._stream)

    def _gather_numbers(self, mine: "NDArray[Any]") -> "NDArray[Any]":
        """Return the rows of all ranks, one of each; waits for them."""
        if self._numbers is None:
            sent = self.gather(mx.array(mine))
            mx.eval(sent)  # raises if a rank was lost, where NumPy would take what the memory holds
            return np.array(sent)
        everyone = self._numbers.gather(mine.tobytes())
        return np.stack([np.frombuffer(row, mine.dtype) for row in everyone])

    def gather_within(self, array: mx.array) -> mx.array:
        """Return what `gather` returns, for use within a larger evaluation; lazy.

        On CUDA the host would wait for the device where an evaluation has work on two streams.
        """
        if self._group is None or self.rank.backend != "nccl":
            return self.gather(array)
        return mx.distributed.all_gather(array, group=self._group)

    @contextmanager
    def communicating(self) -> Iterator[None]:
        """Run the operations of the block on the stream of the collectives, so that they do not hold up others."""
        if self._stream is None:
            yield
            return
        with mx.stream(self._stream):
            yield

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Run additions of what was received on the stream of the collectives, where that is on the GPU."""
        if self.rank.backend == "nccl":
            with self.communicating():
                yield
        else:
            yield

    def sum(self, array: mx.array) -> mx.array:
        """Return the sum of the arrays of all ranks, in the order of the backend; lazy."""
        if self._group is None:
            return array
        return mx.distributed.all_sum(array, group=self._group, stream=self._stream)

    @property
    def scatters(self) -> bool:
        """Whether the backend can give each rank its part of a sum alone."""
        return self.rank.backend in SCATTERING

    def sum_part(self, rows: mx.array) -> mx.array:
        """Return this rank's row of the sum of the arrays of all ranks, (1, N), in the order of the backend; lazy.

        Args:
            rows: one for each rank, (number of ranks, N).
        """
        return mx.distributed.sum_scatter(rows, group=self._group, stream=self._stream)

    def sum_part_within(self, rows: mx.array) -> mx.array:
        """Return what `sum_part` returns, for use within a larger evaluation; lazy."""
        if self.rank.backend != "nccl":
            return self.sum_part(rows)
        return mx.distributed.sum_scatter(rows, group=self._group)

    def take_turns(self, mine: "Sequence[NDArray[np.float32]]") -> "list[NDArray[np.float32]]":
        """Return the arrays of all ranks in turns: the first of each rank, then the second of each, and so on.

        Args:
            mine: arrays of one dimension; no rank has more than rank 0, or fewer by more than one.
        """
        if self._group is None:
            return list(mine)
        count = int(self.exchange("number of parts", [len(mine)]).max())
        lengths = self.exchange("lengths of parts", [*map(len, mine), *[-1] * (count - len(mine))])
        longest = max(1, int(np.maximum(lengths, 0).sum(axis=1).max()))
        flat = np.zeros((1, longest), np.float32)
        whole = np.concatenate([np.empty(0, np.float32), *mine])
        flat[0, : len(whole)] = whole
        rows = self._gather_numbers(flat)
        ends = np.maximum(lengths, 0).cumsum(axis=1)
        return [
            rows[rank, ends[rank, turn] - lengths[rank, turn] : ends[rank, turn]]
            for turn in range(count)
            for rank in range(self.size)
            if lengths[rank, turn] >= 0
        ]

    def require_equal(self, digests: Mapping[str, str], *, task: str) -> None:
        """Compare digests of all ranks.

        Args:
            digests: by what they are of, in words; the same keys on all ranks.
            task: the stage, for the message.

        Raises:
            StageError: a rank has other ones; it is named.
        """
        everyone = self.exchange("comparison", [_number_of(digest) for digest in digests.values()])
        lines = [
            f"{task}: rank {odd_rank(everyone[:, column])} has other {name} than the other ranks. "
            "Every rank must run the same code on the same files."
            for column, name in enumerate(digests)
            if odd_rank(everyone[:, column]) is not None
        ]
        if lines:
            raise StageError("\n".join(lines))


def odd_rank(values: "NDArray[np.int64]") -> int | None:
    """Return the first rank whose value differs from that of most ranks (of rank 0, if as many have another one).

    Args:
        values: one of each rank.
    """
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) == 1:
        return None
    usual = kinds[counts == counts.max()]
    expected = values[0] if values[0] in usual else usual[0]
    return int(np.flatnonzero(values != expected)[0])


def _number_of(text: str) -> int:
    """Return 63 bits of a text's digest."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _communication_stream(backend: str) -> mx.Stream:
    """Return the stream of all collectives; a stream of its own lets them overlap with computing."""
    return mx.new_stream(mx.gpu) if backend == "nccl" else cpu_backend.new_stream()


#: The team of a process that trains alone.
SOLO = Team(ALONE, None)


@functools.cache
def of_this_process() -> Team:
    """Return the team of this process, connected to the other ranks; like MLX's group, it is kept until the end.

    Raises:
        JoinError: the ranks cannot connect.
    """
    rank = place_of_this_process()
    if rank.size == 1:
        return SOLO
    heart = Heart(rank.beats)
    heart.beat(-1, "joining the other ranks", waits=True)
    try:
        group = mx.distributed.init(strict=True, backend=rank.backend)
        numbers = _meet(rank)
    except (RuntimeError, OSError) as error:
        raise JoinError(str(error)) from error
    if (group.rank(), group.size()) != (rank.number, rank.size):
        raise JoinError(f"{rank.backend} gave rank {group.rank()} of {group.size()}, not {rank.number} of {rank.size}")
    heart.beat(-1, "preparing the training")
    return Team(rank, group, numbers)


def _meet(rank: Rank) -> NumberExchange | None:
    """Return the exchange of numbers of the ranks of nccl; None for other backends.

    Raises:
        OSError: the ranks cannot meet.
    """
    file = os.environ.pop(MEETING, None)
    if file is None:
        return None
    return NumberExchange(Meeting.read(Path(file).read_text()), rank.number, rank.size)
