"""The summed gradients of an update over the ranks of a distributed run.

The rows of an update are split into the forward passes that one process would make. Pass i belongs to rank i modulo the
number of ranks. After each round of passes, one of each rank, the gradients are added in the order of the passes: the
sum has the bits of one process's. With `reduction = "fast"` each rank adds its own passes, and the backend adds those
of the ranks.

Before each reduction the ranks exchange a few numbers: whether the pass fit into the memory, whether a signal asks to
stop, and the digest of the weights. The device computes meanwhile.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from mlxflow.data.loader import DeviceBatch
from mlxflow.device.memory_errors import is_late, out_of_memory_bytes, settle
from mlxflow.distributed.team import Team, odd_rank
from mlxflow.distributed.weight_digest import digest_of
from mlxflow.messages.errors import StageError
from mlxflow.training.accumulation import RunParts, Summed, send
from mlxflow.training.batch_size import split
from mlxflow.training.gradient_packing import Gradients, Joined
from mlxflow.training.random_streams import RandomStream
from mlxflow.training.rank_step import Packed, RankStep, Sums
from mlxflow.training.settings import SettingNames


class _Pass(NamedTuple):
    """A forward pass of this rank.

    Attributes:
        number: of the pass in the update.
        begin: its first row, among those that this rank has read.
        end: one past its last.
    """

    number: int
    begin: int
    end: int


#: Without rows: of a rank that takes part in what other ranks compute.
_EMPTY = _Pass(-1, 0, 0)


class _Status(NamedTuple):
    """The numbers that the ranks exchange before a reduction: of one rank, or a column of each of all ranks."""

    batch_size: Any
    passes: Any
    targets: Any
    is_out_of_memory: Any
    needed_bytes: Any
    stops: Any
    draws: Any
    waited_ms: Any
    weights: Any


class _TooManyRowsError(Exception):
    """A rank could not compute its pass; all of them try again with fewer rows."""

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(needed_bytes)
        self.needed_bytes = needed_bytes


class RankAccumulator:
    """Sums the gradients of an update over all ranks; see `accumulation.Accumulator`.

    Args:
        team: of this process.
        parts: of the run.
        signalled: whether a signal asks this process to end the run.
        names: of the settings, for messages.

    Attributes:
        partial: the sums of an update that one process began and was stopped in; None without one.
    """

    def __init__(self, team: Team, parts: RunParts, signalled: Callable[[], bool], names: SettingNames) -> None:
        self.partial: Gradients | None = None
        self._team = team
        self._parts = parts
        self._rank_step = RankStep(parts.step, parts.step.packing(), team)
        self._signalled = signalled
        self._task = names.table or "training"
        self._stops = False
        self._random = RandomStream()
        self._digest: mx.array | None = None
        self._batch: DeviceBatch | None = None
        self._passes: list[_Pass] = []
        self._count = 0  # passes of all ranks in this update
        self._targets = 0  # of all ranks
        self._width: int | None = None
        self._shapes: set[tuple[int, int]] = set()

    def begin(self, digests: Mapping[str, str]) -> None:
        """Compare this rank with the others before its first step.

        Args:
            digests: of what all ranks must share, by its name.

        Raises:
            StageError: a rank differs.
        """
        own = {"weights": str(self._weights_digest().item()), "checkpoint": str(self._parts.state.step)}
        self._team.step = self._parts.state.step
        self._team.require_equal({**digests, **own}, task=self._task)

    def after_update(self, *, compares: bool) -> None:
        """Note the digest of the weights after an update, if they are to be compared; the next exchange compares it."""
        if compares:
            self._digest = self._weights_digest()
            mx.async_eval(self._digest)

    def finish(self) -> None:
        """Compare the weights at the end of the training, and report the end to the supervisor.

        Raises:
            StageError: a rank differs.
        """
        self._team.require_equal({"weights": str(self._weights_digest().item())}, task=self._task)
        self._team.heart.beat(self._team.step, "after the training", is_done=True)

    def stop_requested(self) -> bool:
        """Return whether a signal asks any rank to end the run; the same on all ranks."""
        return self._stops

    def take_batch(self, *, is_whole: bool = False) -> bool:
        """Take this rank's rows of the next update; return whether a shape of its forward passes is new.

        Args:
            is_whole: compute the padding, too, so that the peak is that of the longest rows.
        """
        self._team.step = self._parts.state.step + 1
        self._team.beat("reading rows")
        self._read_rows()
        batch = cast("DeviceBatch", self._batch)
        self._width = batch.tokens.shape[1] - 1 if is_whole else None
        shapes = {(one.end - one.begin, self._width or batch.width(one.begin, one.end)) for one in self._passes}
        new = shapes - self._shapes
        self._shapes |= new
        return bool(new)

    def _read_rows(self) -> None:
        sizes, team = self._parts.sizes, self._team
        team.batch_size = sizes.size
        rows = sizes.rows_per_update
        spans = [span for span in split(rows, sizes.size) if span[1] > self._parts.state.rows_done]
        self._count = len(spans)
        own, self._passes = [np.empty(0, np.int64)], []
        for number, (first, last) in list(enumerate(spans))[team.rank.number :: team.size]:
            begin = sum(map(len, own))
            own.append(np.arange(first, last, dtype=np.int64))
            self._passes.append(_Pass(number, begin, begin + last - first))
        self._batch = self._parts.batches.take(rows, np.concatenate(own))

    def _read_rows_again(self) -> None:
        """Read this rank's rows of the same update, whose batch size has changed."""
        self._parts.batches.close()
        self._read_rows()

    def accumulate(self, *, waits: bool) -> Summed:
        """Return the sums of the update, the same on all ranks; with smaller batches after a rank was out of memory.

        Args:
            waits: whether to wait for the device after each forward pass.

        Raises:
            StageError: the ranks differ in their weights or in what they do.
            WorkflowError: no batch fits into the memory of every rank.
        """
        parts = self._parts
        while True:
            if parts.sizes.must_shrink(parts.state.step):
                parts.recorder.write(parts.sizes.follow_shrink(parts.state.step).record())
                self._read_rows_again()
            self._random.begin_update()
            try:
                sums = self._fast(waits) if self._team.rank.reduction == "fast" else self._in_order(waits)
            except _TooManyRowsError as error:
                needed = error.needed_bytes
            else:
                self._random.end_update(self._count)
                self.partial = self._batch = None
                gradients = self._rank_step.unpack(sums)
                if waits:
                    self._send(gradients, waits=True)
                return Summed(gradients, self._targets, parts.batches.cursor)
            self.partial, parts.state.rows_done = None, 0
            parts.recorder.write(parts.memory.shrink(parts.state.step, needed).record())
            self._read_rows_again()
            waits = True  # the next one may be too large, too

    def _in_order(self, waits: bool) -> Sums:
        """Return the sums of all passes, added in their order after each round of them."""
        team, rank_step = self._team, self._rank_step
        so_far = None if self.partial is None else rank_step.begun(self.partial)
        for first in range(0, self._count, team.size):
            if so_far is not None:
                self._send(so_far, waits=waits)
            own = [one for one in self._passes if first <= one.number < first + team.size]
            if self._parts.step.gathers:  # with those that have a pass
                own = own or [_EMPTY]
            mine = self._computed(own, None, waits=waits)
            count = min(team.size, self._count - first)
            team.beat("sum of gradients", waits=True)
            so_far = rank_step.add_in_rank_order(so_far, mine, count)
            team.beat("update")
        return cast("Sums", so_far)

    def _fast(self, waits: bool) -> Sums:
        """Return the sums of all passes, added by each rank and then by the backend."""
        layers, partial = self._parts.step.layers, self.partial
        begun: Packed | None = None
        if partial is not None and (layers is not None or self._team.rank.is_first):
            begun = self._rank_step.pack(partial if layers is None else layers.own_sums(partial))
        passes = self._passes
        if self._parts.step.gathers:  # the passes of all ranks gather weights together
            most = -(-self._count // self._team.size)
            passes = [*passes, *[_EMPTY] * (most - len(passes))]
        mine = self._computed(passes, begun, waits=waits)
        self._team.beat("sum of gradients", waits=True)
        sums = self._rank_step.sum_fast(mine)
        self._team.beat("update")
        return sums

    def _send(self, packed: Sums | Joined, *, waits: bool) -> None:
        self._team.beat("sum of gradients", waits=waits)
        send(packed, self._parts.state, waits=waits)
        self._team.beat("update")

    def _computed(self, passes: list[_Pass], begun: Packed | None, *, waits: bool) -> Packed:
        """Return the sums of this rank's passes, when every rank has computed its own.

        Raises:
            _TooManyRowsError: a rank could not.
        """
        so_far, needed = begun, None
        try:
            for one in passes:
                self._team.beat("forward pass")
                so_far = self._forward(one, so_far, adds=begun is not None or len(passes) > 1)
                # of the last pass only the first part: the others follow while it is sent; by then the most memory
                # of a backward pass is in use
                send(so_far if waits or one is not passes[-1] else so_far[0], self._parts.state, waits=waits)
            if so_far is None:
                so_far = self._rank_step.zeros()
        except RuntimeError as error:
            needed = out_of_memory_bytes(error)
            # where the layers are split, the others wait in this pass for this rank
            if needed is None or (is_late(error) and not waits) or self._parts.step.gathers:
                raise
            settle(drops=waits)
        self._agree(needed)
        return cast("Packed", so_far)

    def _forward(self, one: _Pass, so_far: Packed | None, *, adds: bool) -> Packed:
        batch = cast("DeviceBatch", self._batch).part(one.begin, one.end, width=self._width)
        if one is _EMPTY:
            batch = tuple(mx.zeros((1, *rows.shape[1:]), rows.dtype) for rows in batch)
        rank_step = self._rank_step

        def compute() -> Packed:
            self._random.begin_pass(max(0, one.number))
            return rank_step.add(so_far, batch) if adds else rank_step.compute(batch)

        gradients = compute()
        if self._random.draws < 0:
            mx.eval(gradients, self._parts.step.state[2])
            if self._random.count_draws():
                gradients = compute()
        return gradients

    def _agree(self, needed_bytes: int | None) -> None:
        """Exchange what all ranks must know before they add their gradients.

        Raises:
            StageError: the ranks differ in their weights or in what they do.
            _TooManyRowsError: a rank has no gradients.
        """
        parts = self._parts
        mine = _Status(
            batch_size=parts.sizes.size,
            passes=self._count,
            targets=cast("DeviceBatch", self._batch).targets,
            is_out_of_memory=int(needed_bytes is not None),
            needed_bytes=needed_bytes or 0,
            stops=int(self._signalled()),
            draws=self._random.draws,
            waited_ms=round(1000 * self._team.waited_seconds),
            weights=self._digest_number(),
        )
        everyone = _Status(*self._team.exchange("check before the sum of gradients", mine).T)
        for what, values in (("a batch size", everyone.batch_size), ("a number of passes", everyone.passes)):
            if (odd := odd_rank(values)) is not None:
                raise StageError(f"{self._task}: rank {odd} has {what} of its own in step {self._team.step}: {values}.")
        if (odd := odd_rank(everyone.weights)) is not None:
            raise StageError(
                f"{self._task}: rank {odd} has other weights than the other ranks after step {parts.state.step}. "
                "Run it again: it resumes from the last checkpoint."
            )
        self._stops |= bool(everyone.stops.any())
        self._random.draws = int(everyone.draws.max())
        self._targets = int(everyone.targets.sum())
        parts.recorder.rank_waited_seconds = (everyone.waited_ms / 1000).tolist()
        if everyone.is_out_of_memory.any():
            raise _TooManyRowsError(int(everyone.needed_bytes.max()))

    def _weights_digest(self) -> mx.array:
        return digest_of(self._parts.step.shared_weights())

    def _digest_number(self) -> int:
        """Return the digest of the weights that was noted, 0 without one; then it is no longer noted."""
        digest, self._digest = self._digest, None
        return 0 if digest is None else cast("int", digest.item())
