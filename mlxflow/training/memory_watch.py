"""Keep a training run within its memory limit: smaller batches, and fewer updates that the host sends ahead."""

from collections.abc import Callable

import mlx.core as mx

from mlxflow.training.batch_size import BatchSizes, Decision, MemoryUse

# How often MLX's limit is lowered, by a quarter each time, before an update is too large
_MOST_THROTTLES = 4


class MemoryWatch:
    """Keeps a training run within its memory limit.

    Args:
        sizes: chooses the batch size.
        limit_bytes: the memory limit of MLX.
        decisive: takes the memory of this process; returns that of the process of the run that decides for all.
    """

    def __init__(
        self, sizes: BatchSizes, limit_bytes: int, decisive: Callable[[MemoryUse], MemoryUse] = lambda own: own
    ) -> None:
        self._decisive = decisive
        self._sizes = sizes
        self._limit = self._lowered_limit = limit_bytes
        self._throttled = 0

    def look(self, step: int) -> Decision | None:
        """Read the memory that the last update used; return the next batch size if it changes.

        Raises:
            WorkflowError: the smallest batch exceeds the limit.
        """
        mx.synchronize()  # a result is available before the buffers of its inputs are freed
        reading = self._decisive(MemoryUse.take(self._limit))
        decision = self._sizes.look(step, reading)
        if decision is None and reading.used > 1:
            self._throttle(reading)
        return decision

    def _throttle(self, reading: MemoryUse) -> None:
        """Lower the limit of MLX, which is a guideline for it: the host then sends fewer operations ahead.

        Raises:
            WorkflowError: lowering it did not help.
        """
        self._throttled += 1
        if self._throttled > _MOST_THROTTLES:
            raise self._sizes.too_large(reading.peak_bytes, reading.limit_bytes)
        self._lowered_limit = max(reading.active_bytes, self._lowered_limit * 3 // 4)
        mx.set_memory_limit(self._lowered_limit)
        mx.clear_cache()

    def avoid(self, step: int, rows: int) -> Decision | None:
        """Choose a smaller batch size than one that ran out of memory in an earlier start; see `BatchSizes.avoid`."""
        return self._sizes.avoid(step, rows, self._decisive(MemoryUse.take(self._limit)))

    def shrink(self, step: int, needed_bytes: int) -> Decision:
        """Choose a smaller batch size after an allocation failed in the update after a step.

        Raises:
            WorkflowError: there is no smaller one.
        """
        mx.clear_cache()
        reading = self._decisive(MemoryUse.take(self._limit))
        return self._sizes.run_out(step, reading, reading.active_bytes + needed_bytes)
