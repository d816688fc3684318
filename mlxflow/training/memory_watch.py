"""The memory of a training run: batch sizes that follow it, and a host that runs less far ahead where it is short."""

import mlx.core as mx

from mlxflow.training.batch_size import BatchSizes, Decision, MemoryUse

# How often MLX's limit is lowered, by a quarter each time, before an update counts as too large
_MOST_THROTTLES = 4


class MemoryWatch:
    """Keeps a training run within its memory limit.

    Args:
        sizes: decides the batch size.
        limit_bytes: what MLX may hold.
    """

    def __init__(self, sizes: BatchSizes, limit_bytes: int) -> None:
        self._sizes = sizes
        self._limit = self._lowered_limit = limit_bytes
        self._throttled = 0

    def look(self, step: int) -> Decision | None:
        """Read the memory that the last update took by itself; return the next batch size if it changes.

        Raises:
            WorkflowError: the updates take more than the limit, and nothing helps.
        """
        mx.synchronize()  # a result is there before the buffers behind it are given back
        reading = MemoryUse.take(self._limit)
        decision = self._sizes.look(step, reading)
        if decision is None and reading.used > 1:
            self._throttle(reading)
        return decision

    def _throttle(self, reading: MemoryUse) -> None:
        """Lower MLX's own limit, which is a guideline only: the host then runs less far ahead.

        Raises:
            WorkflowError: that was done and did not help.
        """
        self._throttled += 1
        if self._throttled > _MOST_THROTTLES:
            raise self._sizes.too_large(reading.peak_bytes, reading.limit_bytes)
        self._lowered_limit = max(reading.active_bytes, self._lowered_limit * 3 // 4)
        mx.set_memory_limit(self._lowered_limit)
        mx.clear_cache()

    def shrink(self, step: int, needed_bytes: int) -> Decision:
        """Choose a smaller batch size, after an allocation failed in the update that follows a step.

        Raises:
            WorkflowError: there is no smaller one.
        """
        mx.clear_cache()
        reading = MemoryUse.take(self._limit)
        return self._sizes.run_out(step, reading, reading.active_bytes + needed_bytes)
