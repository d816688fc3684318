"""Keep a training run within its memory limit: smaller batches, and fewer operations that the host sends ahead."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx

from mlxflow.device import memory_limit, phase_peaks
from mlxflow.distributed.team import SOLO, Team
from mlxflow.training.batch_size import BatchSizes, Decision, MemoryUse
from mlxflow.training.memory_threshold import MemoryThreshold

# How many readings in a row may be above the limit, each with a lower threshold, before an update is too large
_MOST_EXCESSES = 4


class MemoryWatch:
    """Keeps a training run within its memory limit.

    MLX's own limit is lower while it is open, see `memory_threshold`; updates and validations each have a threshold.

    Args:
        sizes: chooses the batch size.
        limit_bytes: the memory limit.
        note_peak: called before MLX's peak is reset.
        team: the ranks of a distributed run; the one that uses most of its limit decides for all.
    """

    def __init__(
        self,
        sizes: BatchSizes,
        limit_bytes: int,
        note_peak: Callable[[], None] = lambda: None,
        team: Team = SOLO,
    ) -> None:
        self._team = team
        self._note_peak = note_peak
        self._sizes = sizes
        self._limit = limit_bytes
        self._of_updates, self._of_validations = MemoryThreshold(limit_bytes), MemoryThreshold(limit_bytes)
        self._excesses = 0
        self._has_fallen = False
        self._set_threshold: Callable[[int], None] = lambda threshold: None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Lower MLX's limit until the block ends."""
        with ExitStack() as blocks:
            self._set_threshold = blocks.enter_context(memory_limit.lowered())
            self._set_threshold(self._of_updates.bytes)
            yield

    def reset(self) -> None:
        """Begin a peak that is not compared with the limit: other work has taken part in the last one."""
        self._note_peak()
        phase_peaks.reset()

    def note_updates(self) -> None:
        """Choose the threshold by the peak since the last one began: that of an update or more.

        After a fall the update that is under way was sent with the threshold before; its peak is not counted.
        """
        if self._has_fallen:
            self._has_fallen = False
            self.reset()
            return
        before = self._of_updates.bytes
        self._learn(self._of_updates, self._take())
        self._has_fallen = self._of_updates.bytes < before
        self._set_threshold(self._of_updates.bytes)

    @contextmanager
    def validation(self) -> Iterator[None]:
        """Measure the peak of a validation, and choose the threshold of the next one by it."""
        self.reset()
        self._set_threshold(self._of_validations.bytes)
        yield
        self._learn(self._of_validations, self._take())
        self._set_threshold(self._of_updates.bytes)

    @contextmanager
    def decisive_update(self) -> Iterator[None]:
        """Take an update that `look` follows.

        What it decides must not depend on how high the threshold has risen, which a resumed run does not know.
        """
        self._set_threshold(self._of_updates.careful_bytes)
        yield
        self._set_threshold(self._of_updates.bytes)

    def look(self, step: int) -> Decision | None:
        """Read the memory that the last update used; return the next batch size if it changes.

        Raises:
            WorkflowError: the smallest batch exceeds the limit.
        """
        mx.synchronize()  # a result is available before the buffers of its inputs are freed
        own = self._take()
        self._learn(self._of_updates, own)
        reading = self._most_used(own)
        decision = self._sizes.look(step, reading)
        if decision is not None:
            self._of_updates = MemoryThreshold(self._limit)
        else:
            self._count_excess(reading)
        return decision

    def _take(self) -> MemoryUse:
        return MemoryUse.take(self._limit)

    def _most_used(self, own: MemoryUse) -> MemoryUse:
        """Return the memory of the rank that uses the largest share of its limit."""
        everyone = [MemoryUse(*row) for row in self._team.exchange("reading of the memory", own).tolist()]
        return max(everyone, key=lambda reading: reading.used)

    def _learn(self, threshold: MemoryThreshold, own: MemoryUse) -> None:
        threshold.learn(own.peak_bytes, own.active_bytes)
        self.reset()

    def _count_excess(self, reading: MemoryUse) -> None:
        """Count the readings in a row above the limit.

        Raises:
            WorkflowError: lower thresholds did not help.
        """
        self._excesses = self._excesses + 1 if reading.used > 1 else 0
        if self._excesses > _MOST_EXCESSES:
            raise self._sizes.too_large(reading.peak_bytes, reading.limit_bytes)
        if self._excesses:
            mx.clear_cache()

    def avoid(self, step: int, rows: int) -> Decision | None:
        """Choose a smaller batch size than one that ran out of memory in an earlier start; see `BatchSizes.avoid`."""
        return self._sizes.avoid(step, rows, self._most_used(self._take()))

    def shrink(self, step: int, needed_bytes: int) -> Decision:
        """Choose a smaller batch size after an allocation failed in the update after a step.

        Raises:
            WorkflowError: there is no smaller one.
        """
        mx.clear_cache()
        reading = self._most_used(self._take())
        decision = self._sizes.run_out(step, reading, reading.active_bytes + needed_bytes)
        self._of_updates = MemoryThreshold(self._limit)
        return decision
