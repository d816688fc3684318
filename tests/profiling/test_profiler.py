import json
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxflow
from mlxflow.profiling.profiler import MemoryProfiler, profile_memory

HUNDRED_MB = 25_000_000  # numbers in fp32


def test_active_memory_is_exact_to_the_byte_after_allocating_and_freeing() -> None:
    profiler = MemoryProfiler()
    before = profiler.read()
    array = mx.zeros((HUNDRED_MB,))
    assert profiler.read().active_memory_bytes < before.active_memory_bytes + 1000  # lazy as yet
    mx.eval(array)
    during = profiler.read()
    assert during.active_memory_bytes - before.active_memory_bytes == pytest.approx(1e8, rel=0.01)
    assert during.rss_bytes - before.rss_bytes > 0.5e8
    del array
    assert profiler.read().active_memory_bytes < before.active_memory_bytes + 1000


def test_a_peak_between_two_readings_is_not_lost() -> None:
    profiler = MemoryProfiler()
    with profile_memory(profiler, "spike"):
        array = mx.zeros((HUNDRED_MB,))
        mx.eval(array)
        del array
    with profile_memory(profiler, "calm"):
        mx.eval(mx.zeros((10,)))
    spike, calm = profiler.phases
    assert (spike.name, calm.name) == ("spike", "calm")
    assert spike.end.peak_memory_bytes - spike.begin.active_memory_bytes == pytest.approx(1e8, rel=0.01)
    assert spike.growth_bytes == 0
    assert calm.end.peak_memory_bytes < calm.begin.active_memory_bytes + 1e6


def test_the_peak_is_at_least_the_active_memory() -> None:
    array = mx.zeros((HUNDRED_MB,))
    mx.eval(array)
    mx.reset_peak_memory()
    reading = MemoryProfiler().read()
    assert reading.peak_memory_bytes >= reading.active_memory_bytes >= array.nbytes


def test_without_a_phase_the_profiler_agrees_with_mlx_s_counter() -> None:
    mx.reset_peak_memory()
    profiler = MemoryProfiler()
    array = mx.zeros((HUNDRED_MB,))
    mx.eval(array)
    assert profiler.peak_memory_bytes == mx.get_peak_memory()


def test_the_growth_of_a_phase_is_the_memory_it_does_not_free() -> None:
    profiler = MemoryProfiler()
    with profile_memory(profiler, "keep"):
        kept = mx.zeros((1_000_000,))
        mx.eval(kept)
    assert profiler.phases[0].growth_bytes == pytest.approx(kept.nbytes, rel=0.01)


def test_a_failed_phase_is_recorded_and_its_error_propagates() -> None:
    profiler = MemoryProfiler()
    with pytest.raises(ZeroDivisionError), profile_memory(profiler, "failing"):
        _ = 1 / 0
    assert [phase.name for phase in profiler.phases] == ["failing"]
    assert profiler.phases[0].error == profiler.totals["failing"].last_error == "ZeroDivisionError"
    assert profiler.totals["failing"].errors == 1


def _spike(numbers: int) -> None:
    array = mx.zeros((numbers,))
    mx.eval(array)
    del array


def test_the_public_names_are_the_profiler_and_importing_the_package_loads_no_mlx() -> None:
    assert mlxflow.MemoryProfiler is MemoryProfiler
    assert mlxflow.profile_memory is profile_memory
    with pytest.raises(AttributeError, match="has no attribute 'profile'"):
        _ = mlxflow.profile
    script = "import sys, mlxflow; print([name for name in ('mlx', 'numpy', 'psutil') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_nested_phase_leaves_the_peak_of_the_outer_phase_intact() -> None:
    profiler = MemoryProfiler()
    base = mx.get_active_memory()
    with profile_memory(profiler, "outer"):
        _spike(HUNDRED_MB)
        with profile_memory(profiler, "inner"):
            _spike(HUNDRED_MB // 2)
        with profile_memory(profiler, "inner"):
            _spike(10)
    peaks = {name: total.peak_memory_bytes - base for name, total in profiler.totals.items()}
    assert peaks["outer"] == pytest.approx(1e8, rel=0.01)
    assert peaks["outer/inner"] == pytest.approx(0.5e8, rel=0.01)
    assert profiler.totals["outer/inner"].calls == 2
    assert profiler.totals["outer"].seconds >= profiler.totals["outer/inner"].seconds > 0


def test_a_decorated_function_is_a_phase_at_each_call() -> None:
    profiler = MemoryProfiler()

    @profile_memory(profiler, "work")
    def work(depth: int) -> int:
        return depth and 1 + work(depth - 1)

    assert work(2) == 2
    assert [phase.name for phase in profiler.phases] == ["work/work/work", "work/work", "work"]


def test_phases_of_threads_are_separate() -> None:
    profiler = MemoryProfiler()

    def work() -> None:
        with profile_memory(profiler, "there"):
            pass

    with profile_memory(profiler, "here"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert set(profiler.totals) == {"here", "there"}


def test_each_step_has_its_own_peak_and_the_report_names_the_highest_with_its_phase() -> None:
    profiler = MemoryProfiler()
    base = mx.get_active_memory()
    profiler.begin_steps()
    for numbers in (1_000_000, 4_000_000, 2_000_000):
        with profile_memory(profiler, "step"), profile_memory(profiler, "forward"):
            _spike(numbers)
        profiler.end_step()
    timeline = profiler.timeline()
    assert timeline["step"].tolist() == [1, 2, 3]
    assert timeline["peak_memory_bytes"] - base == pytest.approx([4e6, 16e6, 8e6], rel=0.01)
    highest = profiler.highest_peaks
    assert [(peak.step, peak.phase) for peak in highest] == [(n, "step/forward") for n in (2, 3, 1)]
    assert highest[0].bytes == timeline["peak_memory_bytes"].max()


def test_a_thread_samples_while_the_program_works() -> None:
    profiler = MemoryProfiler(samples_per_second=500)
    with profiler.sampling():
        while not len(profiler.timeline()["sample_rss_bytes"]):
            _spike(1000)
    samples = profiler.timeline()
    assert samples["sample_rss_bytes"].min() > 1e6
    assert {len(values) for name, values in samples.items() if name.startswith("sample_")} == {
        len(samples["sample_seconds"])
    }
    assert not any(thread.name == "memory-sampler" for thread in threading.enumerate())


def test_all_four_kinds_of_memory_are_reported() -> None:
    reading = MemoryProfiler().read()
    assert reading.rss_bytes > 1e7
    assert reading.available_bytes > 1e7
    assert reading.footprint_bytes > 1e6
    assert 0 <= reading.pressure <= 100


def test_readings_are_written_to_the_journal_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxflow.profiling.timeline_journal._WAIT_SECONDS", 0.0)
    path = tmp_path / "journal.jsonl"
    profiler = MemoryProfiler(samples_per_second=500, journal=path)

    def told() -> list[list[object]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    with profile_memory(profiler, "step"):
        assert told()[-1][:2] == ["enter", "step"]
    reading = profiler.end_step()
    assert told()[0][1:] == list(reading._fields)
    assert told()[-1] == ["step", 1, *reading]
    phase = profiler.phases[0]
    assert ["phase", "step", phase.begin.seconds, phase.end.seconds, phase.end.peak_memory_bytes] in told()
    with profiler.sampling():
        while told()[-1][0] != "sample":
            _spike(1000)
    samples = profiler.timeline()
    assert told()[-1][1:4] == [
        pytest.approx(samples[f"sample_{name}"][-1]) for name in ("seconds", "active_memory_bytes", "peak_memory_bytes")
    ]
    profiler.close()
    profiler.end_step()
    assert told()[-1] == ["end"]


def test_a_timeline_has_the_first_and_the_latest_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxflow.profiling.profiler._KEPT_PHASES", 4)
    monkeypatch.setattr("mlxflow.profiling.profiler._FIRST_PHASES", 1)
    profiler = MemoryProfiler()
    for name in ("load", *"abab", "update", "a"):
        with profile_memory(profiler, name):
            pass
    timeline, names = profiler.timeline(), list(profiler.totals)
    assert [names[number] for number in timeline["phase_number"]] == ["load", "a", "b", "update", "a"]
    assert np.all(timeline["phase_begin_seconds"] <= timeline["phase_end_seconds"])


def test_memory_limits_that_are_set_stay_in_force() -> None:
    memory, cache = mx.set_memory_limit(123 << 20), mx.set_cache_limit(45 << 20)
    profiler = MemoryProfiler()
    try:
        for _ in range(2):
            assert profiler.limits == (123 << 20, 45 << 20)
    finally:
        profiler.close()
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)
