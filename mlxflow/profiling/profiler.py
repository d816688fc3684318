"""Memory profiler: readings of MLX, the process and the system for each step and each phase of a program.

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
from mlxflow.report.stage_reports.profile import PeakFigures

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MemoryProfiler", "MemoryReading", "Phase", "PhaseTotal", "profile_memory"]

#: Samples a second of the sampling thread, which then takes under one percent of a core (`benchmarks/profiler.py`).
DEFAULT_SAMPLES_PER_SECOND = 20.0

_KEPT_ROWS = 1 << 13
_KEPT_PHASES, _FIRST_PHASES = 1 << 12, 1 << 6
_HIGHEST = 8
_FRACTIONS = ("seconds", "pressure")
_MOST = ("peak_memory_bytes", "rss_bytes", "footprint_bytes")


class Phase(NamedTuple):
    """One pass through a `profile_memory` block.

    Attributes:
        name: as given; a nested phase has its parent's name as a prefix, such as "training_step/update".
        begin: the reading at its begin.
        end: the reading at its end; its `peak_memory_bytes` is the peak within the phase.
        error: the type of the exception that ended it, or empty.
    """

    name: str
    begin: MemoryReading
    end: MemoryReading
    error: str

    @property
    def growth_bytes(self) -> int:
        """Growth of the active memory over the phase, in bytes."""
        return self.end.active_memory_bytes - self.begin.active_memory_bytes

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.end.seconds - self.begin.seconds


class PhaseTotal:
    """All passes through phases of one name.

    Attributes:
        calls: number of passes.
        seconds: their total duration.
        peak_memory_bytes: the highest peak of MLX's arrays in any of them.
        growth_bytes: total growth of the active memory.
        errors: number of passes that ended by an exception.
        last_error: the type of the last such exception.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.seconds = 0.0
        self.peak_memory_bytes = 0
        self.growth_bytes = 0
        self.errors = 0
        self.last_error = ""

    def add(self, phase: Phase) -> None:
        """Add one pass."""
        self.calls += 1
        self.seconds += phase.seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, phase.end.peak_memory_bytes)
        self.growth_bytes += phase.growth_bytes
        self.errors += bool(phase.error)
        self.last_error = phase.error or self.last_error


# Of a step in which no phase has ended yet
_NO_PEAK = PeakFigures(bytes=0, step=1, phase="")


class Highest(NamedTuple):
    """Maxima over readings, in bytes.

    Attributes:
        reserved_bytes: memory that MLX took from the system: arrays and freed buffers together.
        process_bytes: the process's resident set, or macOS's footprint if that is larger.
    """

    reserved_bytes: int
    process_bytes: int

    def with_reading(self, reading: MemoryReading) -> "Highest":
        """Return the maxima including one more reading."""
        return Highest(
            max(self.reserved_bytes, reading.active_memory_bytes + reading.cache_memory_bytes),
            max(self.process_bytes, reading.rss_bytes, reading.footprint_bytes),
        )


class MemoryProfiler:
    """Records memory by step and by phase, in an amount of memory that does not depend on the run's length.

    MLX has a single peak counter. A profiler resets it at the end of each step and wherever a phase begins or ends, so
    `mx.get_peak_memory()` is then less than the program's peak: use `peak_memory_bytes` instead.

    Args:
        samples_per_second: of the sampling thread.
        journal: a file to which every reading and phase is written at once, so that they survive if the program is
            killed (`mlxflow.profiling.timeline_journal`); None for none.

    Attributes:
        highest: maxima over all readings since `begin_steps`.
        phases: the latest finished phases, in the order in which they ended.
        totals: totals by phase name, in the order in which the names first ended.
        steps: number of finished steps.
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
        self._highest: list[PeakFigures] = []
        self.highest = Highest(0, 0)
        self._step_phase = _NO_PEAK
        self._first_phases: list[Phase] = []
        self.phases: deque[Phase] = deque(maxlen=_KEPT_PHASES)
        self.totals: dict[str, PhaseTotal] = {}
        self.steps = 0

    def read(self) -> MemoryReading:
        """Return a reading in which every figure is current."""
        return self._reader.read(fresh=True)

    @property
    def limits(self) -> Limits:
        """MLX's memory limits."""
        return read_limits()

    @property
    def peak_memory_bytes(self) -> int:
        """The value of `mx.get_peak_memory()` if mlxflow had not reset it since this profiler was made, in bytes.

        That is the larger of its value then and the peak of MLX's arrays since, until `close`.
        """
        since = self._whole_peak.bytes if self._is_closed else phase_peaks.so_far(self._whole_peak)
        return max(self._peak_before, since)

    def close(self) -> None:
        """Close the files that are read and written; call it after the last measurement."""
        if not self._is_closed:
            phase_peaks.close_peak(self._whole_peak)
            self._is_closed = True
        self._release()

    def _release(self) -> None:
        """Release everything without a call of MLX: safe while the interpreter shuts down."""
        self._reader.close()
        phase_peaks.forget(self._whole_peak)
        phase_peaks.forget(self._step_peak)
        if self._journal:
            self._journal.close()

    def __del__(self) -> None:
        if hasattr(self, "steps"):  # else `__init__` did not finish
            self._release()

    # --- steps

    def begin_steps(self) -> None:
        """Start the first step's peak here instead of when the profiler was made."""
        phase_peaks.note_peak(self._step_peak)
        self._step_phase = _NO_PEAK
        self.highest = Highest(0, 0).with_reading(self._reader.read(fresh=True))

    def end_step(self) -> MemoryReading:
        """Record and return a reading at the end of a step, with the peak since the end of the last one."""
        peak = phase_peaks.note_peak(self._step_peak)
        reading = self._reader.read(fresh=False)._replace(peak_memory_bytes=peak)
        self.steps += 1
        with self._lock:
            self.highest = self.highest.with_reading(reading)
            self._steps.append((self.steps, *reading))
            phase = self._step_phase.phase if self._step_phase.bytes >= peak else ""
            self._highest = sorted(
                [*self._highest, PeakFigures(bytes=peak, step=self.steps, phase=phase)], key=_by_height
            )[:_HIGHEST]
            self._step_phase = _NO_PEAK
        if self._journal:
            self._journal.append("step", self.steps, *reading)
        return reading

    @property
    def highest_peaks(self) -> list[PeakFigures]:
        """The highest peaks of steps, the highest first, each with its innermost phase."""
        return list(self._highest)

    def timeline(self) -> dict[str, Any]:
        """Return the columns of steps, of samples (`sample_...`) and of phases (`phase_...`) by name.

        `phase_number` is the place of the phase's name in `totals`. Of very many phases only the first and the latest
        are included.
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
        """Take readings in a thread until the block ends."""
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
        """Begin a phase; returns the argument for `leave`."""
        stack: list[str] = self._names.__dict__.setdefault("stack", [])
        stack.append(f"{stack[-1]}/{name}" if stack else name)
        peak = phase_peaks.open_peak()
        begin = self._reader.read(fresh=False)
        if self._journal:
            self._journal.append("enter", stack[-1], begin.seconds)
        return stack[-1], begin, peak

    def leave(self, begun: tuple[str, MemoryReading, phase_peaks.OpenPeak], error: BaseException | None) -> None:
        """End a phase and record it."""
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
            if peak > self._step_phase.bytes:  # an enclosing phase ends later with the same peak
                self._step_phase = PeakFigures(bytes=peak, step=self.steps + 1, phase=name)


def _phase_columns(phases: list[Phase], numbers: dict[str, int]) -> "dict[str, NDArray[np.generic]]":
    return {
        "number": np.array([numbers[phase.name] for phase in phases], np.int64),
        "begin_seconds": np.array([phase.begin.seconds for phase in phases], np.float32),
        "end_seconds": np.array([phase.end.seconds for phase in phases], np.float32),
        "peak_memory_bytes": np.array([phase.end.peak_memory_bytes for phase in phases], np.int64),
    }


def _by_height(peak: PeakFigures) -> tuple[int, int]:
    return -peak.bytes, peak.step


@contextmanager
def profile_memory(profiler: MemoryProfiler, phase: str) -> Iterator[None]:
    """Record one phase: the readings at its begin and end and the peak within it, also if it ends by an exception.

    Phases may be nested and run in several threads. MLX's peak counter is reset at both ends; see
    `MemoryProfiler.peak_memory_bytes`. As a decorator, `@profile_memory(profiler, "load")`, it records each call.
    Evaluate the phase's results inside the block: lazy work counts where it is evaluated.

    Args:
        profiler: records the phase.
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
