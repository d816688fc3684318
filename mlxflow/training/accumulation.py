"""The summed gradients of an update, by forward passes of the chosen batch size; smaller ones after out of memory."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlxflow.data.loader import DeviceBatch
from mlxflow.device.memory_errors import is_late, out_of_memory_bytes, settle
from mlxflow.training.batch_size import BatchSizes, split
from mlxflow.training.batches import Batches
from mlxflow.training.gradient_packing import Gradients, Joined
from mlxflow.training.memory_watch import MemoryWatch
from mlxflow.training.recorder import Recorder
from mlxflow.training.run_state import RunState
from mlxflow.training.step import Step


class Summed(NamedTuple):
    """The sums of an update.

    Attributes:
        gradients: of all its rows; lazy.
        targets: tokens that the model learns to predict.
        cursor: rows of the stream that are used when the update is done.
    """

    gradients: Gradients | Joined
    targets: int
    cursor: int


class RunParts(NamedTuple):
    """The parts of a training run that an accumulator works with.

    Attributes:
        step: of the model.
        sizes: of the batches.
        memory: chooses smaller batches.
        recorder: of their changes.
        batches: the rows.
        state: of the run.
    """

    step: Step
    sizes: BatchSizes
    memory: MemoryWatch
    recorder: Recorder
    batches: Batches
    state: RunState


class Accumulator:
    """Sums the gradients of an update on one process.

    Args:
        parts: of the run.
        stop_requested: whether the run is to end.
        stop: saves a checkpoint and raises the exception that ends the run.

    Attributes:
        partial: the sums of an update that was interrupted, None without one; `rows_done` of the state is its rows.
        stop_requested: asked after each update.
    """

    def __init__(self, parts: RunParts, stop_requested: Callable[[], bool], stop: Callable[[], object]) -> None:
        self.partial: Gradients | None = None
        self.stop_requested = stop_requested
        self._parts = parts
        self._stop = stop
        self._batch: DeviceBatch | None = None
        self._width: int | None = None
        self._shapes: set[tuple[str, int, int]] = set()

    def begin(self, digests: Mapping[str, str]) -> None:
        """Begin the training; a single process compares nothing."""

    def after_update(self, *, compares: bool) -> None:
        """Do nothing; the ranks of a distributed run compare their weights."""

    def finish(self) -> None:
        """End the training."""

    def take_batch(self, *, is_whole: bool = False) -> bool:
        """Take the rows of the next update; return whether a shape of its forward passes is new.

        Args:
            is_whole: compute the padding, too, so that the peak is that of the longest rows.
        """
        rows = self._parts.sizes.rows_per_update
        batch = self._batch = self._parts.batches.take(rows)
        self._width = batch.tokens.shape[1] - 1 if is_whole else None
        kind = "compute" if self._is_one_pass(rows) else "add"
        spans = split(rows, self._parts.sizes.size)
        new = {(kind, end - begin, self._width or batch.width(begin, end)) for begin, end in spans} - self._shapes
        self._shapes |= new
        return bool(new)

    def accumulate(self, *, waits: bool) -> Summed:
        """Return the sums of the update whose rows were taken, with smaller batches after an allocation failed.

        Args:
            waits: whether to wait for the device after each forward pass; then all earlier work is done.

        Raises:
            WorkflowError: no batch fits into the memory.
            RuntimeError: an earlier update failed, so that the weights may be wrong.
        """
        parts, batch = self._parts, cast("DeviceBatch", self._batch)
        self._batch = None
        while True:
            if parts.sizes.must_shrink(parts.state.step):
                parts.recorder.write(parts.sizes.follow_shrink(parts.state.step).record())
            try:
                return Summed(self._pass_over(batch, waits=waits), batch.targets, parts.batches.cursor)
            except RuntimeError as error:
                needed = out_of_memory_bytes(error)
                if needed is None or (is_late(error) and not waits):
                    raise
            settle(drops=waits)
            self.partial, parts.state.rows_done = None, 0
            parts.recorder.write(parts.memory.shrink(parts.state.step, needed).record())
            waits = True  # the next one may be too large, too

    def _pass_over(self, batch: DeviceBatch, *, waits: bool) -> Gradients:
        rows, parts = len(batch.tokens), self._parts
        if self._is_one_pass(rows):
            gradients = parts.step.compute(*batch.part(0, rows, width=self._width))
            send(gradients, parts.state, waits=waits)
            return gradients
        so_far = self.partial
        for begin, end in split(rows, parts.sizes.size):
            if end <= parts.state.rows_done:
                continue
            so_far = parts.step.add(so_far, *batch.part(begin, end, width=self._width))
            send(so_far, parts.state, waits=waits)
            parts.state.rows_done, self.partial = end, so_far
            if end < rows and self.stop_requested():
                self._stop()
        self.partial = None
        return cast("Gradients", so_far)

    def _is_one_pass(self, rows: int) -> bool:
        return rows <= self._parts.sizes.size and self.partial is None


def send(what: Any, state: RunState, *, waits: bool) -> None:
    """Let the device compute arrays, and wait for them if asked."""
    if waits:
        wait(what, state)
    else:
        mx.async_eval(what)


def wait(what: Any, state: RunState) -> None:
    """Wait until the device has computed arrays, and count the time."""
    begin = time.perf_counter()
    mx.eval(what)
    state.device_wait_seconds += time.perf_counter() - begin
