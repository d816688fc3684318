import mlx.core as mx
import pytest

from mlxflow.measurement.memory import MemoryProfiler, profile_memory

HUNDRED_MB = 25_000_000  # numbers in fp32


def test_what_is_allocated_is_read_to_the_byte_and_what_is_freed_is_gone() -> None:
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


def test_the_peak_is_never_less_than_what_is_alive() -> None:
    array = mx.zeros((HUNDRED_MB,))
    mx.eval(array)
    mx.reset_peak_memory()
    reading = MemoryProfiler().read()
    assert reading.peak_memory_bytes >= reading.active_memory_bytes >= array.nbytes


def test_what_a_phase_leaves_behind_is_its_growth() -> None:
    profiler = MemoryProfiler()
    with profile_memory(profiler, "keep"):
        kept = mx.zeros((1_000_000,))
        mx.eval(kept)
    assert profiler.phases[0].growth_bytes == pytest.approx(kept.nbytes, rel=0.01)


def test_a_phase_that_fails_is_recorded_and_the_error_goes_on() -> None:
    profiler = MemoryProfiler()
    with pytest.raises(ZeroDivisionError), profile_memory(profiler, "failing"):
        _ = 1 / 0
    assert [phase.name for phase in profiler.phases] == ["failing"]
