"""Where memory goes: MLX's own counters, the process and the system, read together by phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import psutil


class Reading(NamedTuple):
    """One look at the memory, all in bytes but the time.

    Attributes:
        seconds: since the profiler was made.
        active_memory_bytes: MLX arrays that are alive.
        peak_memory_bytes: the most they were since the last reset, never less than what is alive now.
        cache_memory_bytes: freed buffers that MLX keeps to use again.
        rss_bytes: what of the process lies in main memory.
        available_bytes: what the system could still give.
    """

    seconds: float
    active_memory_bytes: int
    peak_memory_bytes: int
    cache_memory_bytes: int
    rss_bytes: int
    available_bytes: int


class Phase(NamedTuple):
    """One pass through a `profile_memory` block."""

    name: str
    begin: Reading
    end: Reading

    @property
    def growth_bytes(self) -> int:
        """Active memory that the phase left behind."""
        return self.end.active_memory_bytes - self.begin.active_memory_bytes


class MemoryProfiler:
    """Takes readings and keeps the phases of a program.

        profiler = MemoryProfiler()
        with profile_memory(profiler, "training_step"):
            ...
        profiler.phases[-1].end.peak_memory_bytes

    Attributes:
        phases: every finished phase, in the order in which they ended.
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._process = psutil.Process()
        self.phases: list[Phase] = []

    def read(self) -> Reading:
        """Return the memory as it is now."""
        active = mx.get_active_memory()
        return Reading(
            time.perf_counter() - self._begin,
            active,
            max(active, mx.get_peak_memory()),  # a reset sets MLX's peak to nothing, not to what is alive
            mx.get_cache_memory(),
            self._process.memory_info().rss,
            psutil.virtual_memory().available,
        )


@contextmanager
def profile_memory(profiler: MemoryProfiler, phase: str) -> Iterator[None]:
    """Record one phase: the readings at its ends and MLX's peak within it, also when it ends by an exception.

    MLX's peak counter is reset at the beginning. Evaluate what the phase computes inside the block: lazy work is
    charged to whoever evaluates it.

    Args:
        profiler: keeps the phase.
        phase: its name.
    """
    mx.reset_peak_memory()
    begin = profiler.read()
    try:
        yield
    finally:
        profiler.phases.append(Phase(phase, begin, profiler.read()))
