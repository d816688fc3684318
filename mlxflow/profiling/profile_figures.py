"""Figures of a profile's report from the readings of its steps."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from mlxflow.profiling.leak_test import find_leak
from mlxflow.profiling.step_memory import STEP
from mlxflow.report.stage_reports.profile import LeakFigures, LeakReport, PhaseFigures, TrendFigures

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlxflow.profiling.profiler import Phase, PhaseTotal

# Growth of less is the allocator's; of the process's memory, whose readings are noisy, growth of less than a share too
_ACTIVE_FLOOR_BYTES, _PROCESS_FLOOR_BYTES, _PROCESS_FLOOR_SHARE = 64, 4096, 0.01
# Fewer steps are all warm-up, seen from outside MLX
_FEWEST_PROCESS_STEPS = 40


def leak(timeline: "Mapping[str, NDArray[Any]]", memory_limit_bytes: int) -> LeakReport:
    """Return whether memory leaks: MLX's arrays; with its cache; the process, both less strictly.

    Args:
        timeline: readings at the steps' ends, (S,) each, by name.
        memory_limit_bytes: of MLX's arrays.
    """
    active = timeline["active_memory_bytes"]
    strict = find_leak(
        active, floor_bytes_per_step=_ACTIVE_FLOOR_BYTES, floor_share=0.0, limit_bytes=memory_limit_bytes
    )
    available = int(timeline["available_bytes"][-1])
    return LeakReport(
        **msgspec.structs.asdict(strict),
        reserved=_softly(active + timeline["cache_memory_bytes"], available),
        process=_softly(timeline["rss_bytes"], available),
    )


def _softly(values: "NDArray[Any]", available_bytes: int) -> LeakFigures:
    if len(values) < _FEWEST_PROCESS_STEPS:
        note = f"{_FEWEST_PROCESS_STEPS} steps are needed for a verdict"
        return LeakFigures(verdict="none", bytes_per_step=0.0, note=note)
    return find_leak(
        values,
        floor_bytes_per_step=_PROCESS_FLOOR_BYTES,
        floor_share=_PROCESS_FLOOR_SHARE,
        limit_bytes=int(values[-1]) + available_bytes,
    )


def trend(timeline: "Mapping[str, NDArray[Any]]") -> TrendFigures:
    """Return the growth of each reading in bytes per step: the median of the slopes between halves.

    Args:
        timeline: readings at the steps' ends, (S,) each, by name.
    """
    half = len(timeline["step"]) // 2
    apart = len(timeline["step"]) - half

    def slope(name: str) -> float:
        return float(np.median(timeline[name][apart:] - timeline[name][:half])) / apart if half else 0.0

    return TrendFigures(
        active_memory_bytes_per_step=slope("active_memory_bytes"),
        peak_memory_bytes_per_step=slope("peak_memory_bytes"),
        cache_memory_bytes_per_step=slope("cache_memory_bytes"),
        rss_bytes_per_step=slope("rss_bytes"),
        available_bytes_per_step=slope("available_bytes"),
    )


def median_step_seconds(passes: "Iterable[Phase]") -> float:
    """Return the median wall-clock seconds of a step.

    Args:
        passes: through all phases.
    """
    return float(np.median([phase.seconds for phase in passes if phase.name == STEP]))


def phases(totals: "Mapping[str, PhaseTotal]") -> tuple[PhaseFigures, ...]:
    """Return the figures of each phase.

    Args:
        totals: by name.
    """
    return tuple(
        PhaseFigures(
            name=name,
            calls=total.calls,
            seconds=total.seconds,
            peak_memory_bytes=total.peak_memory_bytes,
            growth_bytes=total.growth_bytes,
        )
        for name, total in totals.items()
    )
