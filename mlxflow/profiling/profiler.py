"""Where memory goes: MLX's own counters, the process and the system, read together by step and by phase.

profiler = MemoryProfiler()
with profiler.sampling():
    for batch in batches:
        with profile_memory(profiler, "training_step"):
            ...
        profiler.end_step()
profiler.totals["training_step"].peak_memory_bytes
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import mlx.core as mx
import numpy as np

from mlxflow.device import phase_peaks
from mlxflow.profiling.downsampled_table import Columns
from mlxflow.profiling.memory_readings import Limits, MemoryReading, Reader, read_limits
from mlxflow.profiling.timeline_journal import TimelineJournal

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MemoryProfiler", "MemoryReading", "Phase", "PhaseTotal", "profile_memory"]

#: Samples a second of the thread; at this rate it takes under one percent of a core (`benchmarks/profiler.py`).
DEFAULT_SAMPLES_PER_SECOND = 20.0

_KEPT_ROWS = 1 << 13
_KEPT_PHASES, _FIRST_PHASES = 1 << 12, 1 << 6
_HIGHEST = 8
_FRACTIONS = ("seconds", "pressure")
_MOST = ("peak_memory_bytes", "rss_bytes", "footprint_bytes")


class Phase(NamedTuple):
    """One pass through a `profile_memory` block.

    Attributes:
        name: as it was given; of a phase within another one, that one's and its own, such as "training_step/update".
        error: the type of the exception that ended it, or nothing.
    """

    name: str
    begin: MemoryReading
    end: MemoryReading
    error: str

    @property
    def growth_bytes(self) -> int:
        """Active memory that the phase left behind."""
        return self.end.active_memory_bytes - self.begin.active_memory_bytes

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end.seconds - self.begin.seconds


class PhaseTotal:
    """All passes through phases of one name.

    Attributes:
        calls: how many.
        seconds: that they took.
        peak_memory_bytes: the most that MLX's arrays held in any of them.
        growth_bytes: active memory that they left behind.
        errors: how many ended by an exception.
        last_error: the type of the last of those.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.seconds = 0.0
        self.peak_memory_bytes = 0
        self.growth_bytes = 0
        self.errors = 0
        self.last_error = ""

    def add(self, phase: Phase) -> None:
        """Count one more."""
        self.calls += 1
        self.seconds += phase.seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, phase.end.peak_memory_bytes)
        self.growth_bytes += phase.growth_bytes
        self.errors += bool(phase.error)
        self.last_error = phase.error or self.last_error


class Peak(NamedTuple):
    """A high point: of which step and phase."""

    bytes: int
    step: int
    phase: str


class Highest(NamedTuple):
    """The most of whole readings, in bytes.

    Attributes:
        reserved_bytes: that MLX took from the system: its arrays and the freed buffers that it kept beside them.
        process_bytes: that the system charged the process for: resident, or macOS's footprint where that is more.
    """

    reserved_bytes: int
    process_bytes: int

    def with_reading(self, reading: MemoryReading) -> "Highest":
        """Return the most with one more reading."""
        return Highest(
            max(self.reserved_bytes, reading.active_memory_bytes + reading.cache_memory_bytes),
            max(self.process_bytes, reading.rss_bytes, reading.footprint_bytes),
        )


class MemoryProfiler:
    """Takes readings and keeps the steps and phases of a program; keeps the same memory however long it runs.

    MLX has one peak counter, which can be reset and not set. A profiler resets it at each step's end and wherever a
    phase begins or ends, so afterwards `mx.get_peak_memory()` is less than the program's peak: read `peak_memory_bytes`
    instead.

    Args:
        samples_per_second: of the sampling thread.
        journal: a file that every reading and phase is written to as it is seen, so that a program that is killed
            leaves them (`mlxflow.profiling.timeline_journal`); None: none.

    Attributes:
        highest: the most of all readings since `begin_steps`.
        phases: the latest finished phases, in the order in which they ended.
        totals: by the phases' names, in the order in which they first ended.
        steps: finished steps.
    """

    def __init__(self, *, samples_per_second: float = DEFAULT_SAMPLES_PER_SECOND, journal: Path | None = None) -> None:
        self._reader = Reader()
        self._journal = TimelineJournal(journal, MemoryReading._fields) if journal else None
        self._every_seconds = 1 / samples_per_second
        self._lock = threading.Lock()
        self._names = threading.local()
        self._steps = Columns(("step", *MemoryReading._fields), capacity=_KEPT_ROWS, most=_MOST)
        self._samples = Columns(MemoryReading._fields, capacity=_KEPT_ROWS, most=_MOST)
        self._peak_before = mx.get_peak_memory()
        self._whole_peak, self._step_peak = phase_peaks.open_peak(), phase_peaks.open_peak()
        self._is_closed = False
        self._highest: list[Peak] = []
        self.highest = Highest(0, 0)
        self._step_phase = Peak(0, 1, "")
        self._first_phases: list[Phase] = []
        self.phases: deque[Phase] = deque(maxlen=_KEPT_PHASES)
        self.totals: dict[str, PhaseTotal] = {}
        self.steps = 0

    def read(self) -> MemoryReading:
        """Return the memory as it is now, all of it read anew."""
        return self._reader.read(fresh=True)

    @property
    def limits(self) -> Limits:
        """What MLX was told to keep to."""
        return read_limits()

    @property
    def peak_memory_bytes(self) -> int:
        """What `mx.get_peak_memory()` would say had nothing in mlxflow reset it since this profiler was made.

        That is the most of what it said then and of what MLX's arrays held since, until `close`.
        """
        since = self._whole_peak.bytes if self._is_closed else phase_peaks.so_far(self._whole_peak)
        return max(self._peak_before, since)

    def close(self) -> None:
        """Give back the files it reads from and writes to; to be called when no more is measured."""
        if not self._is_closed:
            phase_peaks.close_peak(self._whole_peak)
            self._is_closed = True
        self._release()

    def _release(self) -> None:
        """Give back what is held without asking MLX: also while the interpreter ends."""
        self._reader.close()
        phase_peaks.forget(self._whole_peak)
        phase_peaks.forget(self._step_peak)
        if self._journal:
            self._journal.close()

    def __del__(self) -> None:
        if hasattr(self, "steps"):  # else it was not made whole
            self._release()

    # --- steps

    def begin_steps(self) -> None:
        """Let the first step's peak begin here instead of at the profiler's making."""
        phase_peaks.note_peak(self._step_peak)
        self._step_phase = Peak(0, 1, "")
        self.highest = Highest(0, 0).with_reading(self._reader.read(fresh=True))

    def end_step(self) -> MemoryReading:
        """Keep a reading at the end of a step, with the peak since the last one's end, and return it."""
        peak = phase_peaks.note_peak(self._step_peak)
        reading = self._reader.read(fresh=False)._replace(peak_memory_bytes=peak)
        self.steps += 1
        with self._lock:
            self.highest = self.highest.with_reading(reading)
            self._steps.append((self.steps, *reading))
            phase = self._step_phase.phase if self._step_phase.bytes >= peak else ""
            self._highest = sorted([*self._highest, Peak(peak, self.steps, phase)], key=_by_height)[:_HIGHEST]
            self._step_phase = Peak(0, self.steps + 1, "")
        if self._journal:
            self._journal.append("step", self.steps, *reading)
        return reading

    @property
    def highest_peaks(self) -> list[Peak]:
        """The highest steps' peaks, the highest first, each with the innermost phase that it fell into."""
        return list(self._highest)

    def timeline(self) -> dict[str, Any]:
        """Return the columns of steps, those of samples (`sample_...`) and those of phases (`phase_...`).

        A phase's number is its name's place in `totals`. Of very many phases the first and the latest are there.
        """
        with self._lock:
            columns = self._steps.arrays(fractions=_FRACTIONS)
            samples = self._samples.arrays(fractions=_FRACTIONS)
            phases = [*self._first_phases, *self.phases]
            numbers = {name: number for number, name in enumerate(self.totals)}
        columns |= {f"sample_{name}": values for name, values in samples.items()}
        return columns | {f"phase_{name}": values for name, values in _phase_columns(phases, numbers).items()}

    # --- samples

    @contextmanager
    def sampling(self) -> Iterator[Self]:
        """Take readings in a thread, too, until the block ends."""
        ended = threading.Event()

        def sample() -> None:
            while not ended.wait(self._every_seconds):
                phase_peaks.look()
                reading = self._reader.read(fresh=False)
                with self._lock:
                    self.highest = self.highest.with_reading(reading)
                    self._samples.append(reading)
                if self._journal:
                    self._journal.keep("sample", *reading)

        thread = threading.Thread(target=sample, name="memory-sampler", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()

    # --- phases

    def enter(self, name: str) -> tuple[str, MemoryReading, phase_peaks.OpenPeak]:
        """Begin a phase; returns what `leave` takes."""
        stack: list[str] = self._names.__dict__.setdefault("stack", [])
        stack.append(f"{stack[-1]}/{name}" if stack else name)
        peak = phase_peaks.open_peak()
        begin = self._reader.read(fresh=False)
        if self._journal:
            self._journal.append("enter", stack[-1], begin.seconds)
        return stack[-1], begin, peak

    def leave(self, begun: tuple[str, MemoryReading, phase_peaks.OpenPeak], error: BaseException | None) -> None:
        """End a phase and keep it."""
        name, begin, open_peak = begun
        peak = phase_peaks.close_peak(open_peak)
        end = self._reader.read(fresh=False)
        end = end._replace(peak_memory_bytes=max(peak, end.active_memory_bytes))
        self._names.stack.pop()
        phase = Phase(name, begin, end, type(error).__name__ if error else "")
        if self._journal:
            self._journal.append("phase", name, begin.seconds, end.seconds, end.peak_memory_bytes)
        with self._lock:
            self.highest = self.highest.with_reading(end)
            if len(self.phases) == _KEPT_PHASES and len(self._first_phases) < _FIRST_PHASES:
                self._first_phases.append(self.phases[0])
            self.phases.append(phase)
            self.totals.setdefault(name, PhaseTotal()).add(phase)
            if peak > self._step_phase.bytes:  # an outer one ends later with the same peak
                self._step_phase = Peak(peak, self.steps + 1, name)


def _phase_columns(phases: list[Phase], numbers: dict[str, int]) -> "dict[str, NDArray[np.generic]]":
    return {
        "number": np.array([numbers[phase.name] for phase in phases], np.int64),
        "begin_seconds": np.array([phase.begin.seconds for phase in phases], np.float32),
        "end_seconds": np.array([phase.end.seconds for phase in phases], np.float32),
        "peak_memory_bytes": np.array([phase.end.peak_memory_bytes for phase in phases], np.int64),
    }


def _by_height(peak: Peak) -> tuple[int, int]:
    return -peak.bytes, peak.step


@contextmanager
def profile_memory(profiler: MemoryProfiler, phase: str) -> Iterator[None]:
    """Record one phase: the readings at its ends and MLX's peak within it, also when it ends by an exception.

    Phases may lie within each other and in several threads. MLX's own peak counter is reset at both ends; see
    `MemoryProfiler.peak_memory_bytes`. As a decorator, `@profile_memory(profiler, "load")`, it
    records each call. Evaluate what the phase computes inside the block: lazy work is charged to whoever evaluates it.

    Args:
        profiler: keeps the phase.
        phase: its name.
    """
    begun = profiler.enter(phase)
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        profiler.leave(begun, error)
