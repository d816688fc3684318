from pathlib import Path

import mlx.core as mx
import pytest

import mlxflow
from mlxflow.device import phase_peaks
from mlxflow.profiling.profiler import MemoryProfiler, profile_memory
from tests.profiling.test_profiler import HUNDRED_MB, _spike


def test_the_profiler_keeps_the_peak_from_before_a_phase() -> None:
    before = mx.get_active_memory()
    _spike(2 * HUNDRED_MB)
    profiler = MemoryProfiler()
    with profile_memory(profiler, "calm"):
        _spike(10)
    assert mx.get_peak_memory() < before + 1e8, "MLX's counter was reset"
    assert profiler.peak_memory_bytes - before == pytest.approx(2e8, rel=0.01), "what it said before the profiler"
    with profile_memory(profiler, "outer"):
        _spike(3 * HUNDRED_MB)
        with profile_memory(profiler, "inner"):
            profiler.end_step()
    assert profiler.peak_memory_bytes - before == pytest.approx(3e8, rel=0.01)
    _spike(4 * HUNDRED_MB)
    assert profiler.peak_memory_bytes - before == pytest.approx(4e8, rel=0.01), "outside of phases, too"
    profiler.close()
    _spike(5 * HUNDRED_MB)
    assert profiler.peak_memory_bytes - before == pytest.approx(4e8, rel=0.01), "closed, it measures no more"


def test_the_peak_of_the_process_outlives_every_phase() -> None:
    _spike(HUNDRED_MB)
    highest = phase_peaks.process_peak()
    assert highest >= 1e8
    with phase_peaks.followed() as peak:
        _spike(10)
    phase_peaks.reset()
    assert peak.bytes < highest
    assert phase_peaks.process_peak() == highest
    _spike(highest // 4 + 100)
    assert phase_peaks.process_peak() > highest


def test_only_one_module_resets_the_counter() -> None:
    package = Path(mlxflow.__file__).parent
    resetting = [path.name for path in sorted(package.rglob("*.py")) if "reset_peak_memory" in path.read_text()]
    assert resetting == ["phase_peaks.py"], "any other would take a peak from a phase or from the process"


def test_two_profilers_share_the_one_counter() -> None:
    one, other = MemoryProfiler(), MemoryProfiler()
    base = mx.get_active_memory()
    with profile_memory(one, "long"):
        _spike(HUNDRED_MB)
        with profile_memory(other, "short"):
            _spike(10)
    assert one.totals["long"].peak_memory_bytes - base == pytest.approx(1e8, rel=0.01)
    assert other.totals["short"].peak_memory_bytes - base < 1e6
