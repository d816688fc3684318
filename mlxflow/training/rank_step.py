"""The compiled parts of an update that several ranks compute together: gradients of some rows, and their sums."""

import functools
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlxflow.distributed import reduction
from mlxflow.distributed.team import Team
from mlxflow.training.flat_parameters import is_split
from mlxflow.training.gradient_packing import GradientPacking, Gradients, Joined
from mlxflow.training.step import Step

#: The sums of some rows as arrays to send, see `GradientPacking`.
Packed = list[mx.array]

#: Sums over ranks: the pieces of each of those arrays.
Sums = list[list[mx.array]]


class RankStep:
    """The parts of an update on one of several ranks.

    Args:
        step: of this rank's model.
        packing: of its gradients.
        team: of this process.
    """

    def __init__(self, step: Step, packing: GradientPacking, team: Team) -> None:
        self._step = step
        self._packing = packing
        self._team = team

        def add(gradients: Gradients, so_far: Packed) -> Packed:
            more = packing.pack(gradients)
            return [one + other.astype(mx.float32) for one, other in zip(so_far, more, strict=True)]

        self._compute = step.compiled(packing.pack)
        self._add = step.compiled(add)
        self._unpack = mx.compile(packing.unpack)

    def compute(self, batch: tuple[mx.array, ...]) -> Packed:
        """Return the gradients of a batch in the dtypes of the weights.

        Args:
            batch: tokens and marks, (B, L + 1) each, and the further arrays that the objective takes.
        """
        return cast("Packed", self._compute(batch))

    def add(self, so_far: Packed | None, batch: tuple[mx.array, ...]) -> Packed:
        """Return the gradients of a batch, see `compute`, added to earlier ones, in fp32."""
        return cast("Packed", self._add(batch, self.zeros() if so_far is None else so_far))

    def zeros(self) -> Packed:
        """Return the sums of no rows, in fp32."""
        return self._packing.pack(self._step.zeros())

    def begun(self, gradients: Gradients) -> Sums:
        """Return sums that an update began with."""
        packed = self._packing.pack(gradients)
        mx.eval(packed)
        return [[part.reshape(-1) for part in reduction.split(array, self._team)] for array in packed]

    def pack(self, gradients: Gradients) -> Packed:
        """Return sums as arrays to send."""
        return self._packing.pack(gradients)

    def unpack(self, sums: Sums) -> Joined:
        """Return sums as the update takes them."""
        return Joined(*cast("tuple[Any, ...]", self._unpack(sums)))

    def add_in_rank_order(self, so_far: Sums | None, mine: Packed, count: int) -> Sums:
        """Return sums to which those of the first ranks were added in rank order, in fp32.

        Each array is sent when it is computed, while the device computes the next, and freed.

        Args:
            so_far: the same on all ranks; None for zeros.
            mine: of this rank; emptied.
            count: number of ranks whose sums are added.
        """
        sums: Sums = []
        mine.reverse()
        while mine:
            mx.async_eval(mine[-1])
            pieces = reduction.gather_pieces(self._team, mine.pop())
            with self._team.adding():
                add = self._added(count)
                sums.append(add(pieces) if so_far is None else add(pieces, so_far[len(sums)]))
                del pieces
                mx.async_eval(sums[-1])
        return sums

    def sum_fast(self, mine: Packed) -> Sums:
        """Return the sums of all ranks in fp32, added in an order that the backend chooses.

        Each array is sent when it is computed, while the device computes the next, and freed. Of arrays that the
        optimizer splits between the ranks, a rank gets its own part alone, where the backend has a reduce-scatter.

        Args:
            mine: of this rank; emptied.
        """
        sums: Sums = []
        shards = self._step.shards if self._team.scatters else None
        mine.reverse()
        for name in self._packing.names:
            scatters = shards is not None and shards.splits(name) and not is_split(name)
            if shards is not None and scatters:
                mine[-1] = shards.rows(mine[-1])
            mx.async_eval(mine[-1])
            if is_split(name):  # the backward pass has added these over the ranks
                sums.append([mine.pop()])
                continue
            pieces = (reduction.sum_part_in_pieces if scatters else reduction.sum_pieces)(self._team, mine.pop())
            with self._team.adding():
                sums.append([part.reshape(-1) for part in pieces])
        return sums

    @functools.cache  # noqa: B019 - lives as long as the training
    def _added(self, count: int) -> Callable[..., list[mx.array]]:
        """Return a compiled `reduction.added_in_rank_order`."""
        return cast(
            "Callable[..., list[mx.array]]", mx.compile(functools.partial(reduction.added_in_rank_order, count=count))
        )
