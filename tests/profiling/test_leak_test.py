"""The leak test on simulated series and on programs that really leak."""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.leaks import SHAPES, ours, rates, simulate
from mlxflow.profiling.leak_test import find_leak
from mlxflow.profiling.profiler import MemoryProfiler
from mlxflow.report.stage_reports.profile import LeakFigures


def _test(values: Any, *, floor: float = 0.0, share: float = 0.0, limit: int | None = None) -> LeakFigures:
    return find_leak(values, floor_bytes_per_step=floor, floor_share=share, limit_bytes=limit)


def test_series_without_a_leak_rarely_raise_an_alarm() -> None:
    assert np.mean(rates(ours, 0.0, 25, 5000)) <= 0.015  # 200 series; one percent is shown by the benchmark


def test_leaks_of_the_size_of_the_noise_are_found() -> None:
    assert np.mean(rates(ours, 0.1, 8, 5000)) >= 0.75
    assert np.mean(rates(ours, 0.2, 8, 5000)) >= 0.9


def test_a_leak_is_reported_with_its_rate_and_end() -> None:
    found = _test(simulate(SHAPES[0], 0, 0.2), floor=4096, share=0.01, limit=2_000_000_000)
    assert found.verdict == "leak"
    assert found.bytes_per_step == pytest.approx(0.2 * 1e9 / 400, rel=0.1)
    assert found.steps_until_limit == pytest.approx(8e8 / 5e5, rel=0.1)


@pytest.mark.parametrize("base", [0, 10**6, 10**10])
def test_a_small_leak_is_found_without_noise_at_any_base_level(base: int) -> None:
    found = _test(base + 256.0 * np.arange(300), floor=64)
    assert found.verdict == "leak"
    assert found.bytes_per_step == pytest.approx(256, rel=0.01)
    assert _test(base + np.zeros(300), floor=64).verdict == "none"
    assert _test(base + 256.0 * np.arange(300), floor=512).verdict == "none"


def test_a_cache_that_fills_to_its_limit_is_bounded_growth() -> None:
    filling = 1e8 + np.minimum(np.arange(300) * 1e6, 1e8)
    assert _test(filling + np.random.default_rng(0).normal(0, 1e5, 300), floor=4096).verdict == "bounded growth"


@pytest.mark.parametrize("length", range(12))
def test_a_series_of_any_length_has_a_verdict(length: int) -> None:
    assert _test([1e6] * length).verdict == "none"


# --- real programs, read as the profiler reads them


def _run(step: Callable[[int], object], *, num_steps: int = 120) -> MemoryProfiler:
    mx.clear_cache()  # a buffer that another test left may be twice as large as what is asked for
    profiler = MemoryProfiler()
    for number in range(num_steps):
        step(number)
        profiler.end_step()
    return profiler


def _verdict(profiler: MemoryProfiler) -> LeakFigures:
    return _test(profiler.timeline()["active_memory_bytes"], floor=128)


def _work(rows: int) -> mx.array:
    weight = mx.ones((64, 64))
    return (mx.ones((rows, 64)) @ weight).sum()


@pytest.mark.parametrize("varies", [False, True])
def test_a_clean_loop_is_no_leak(varies: bool) -> None:
    found = _verdict(_run(lambda number: mx.eval(_work(8 + number * 7 % 50 if varies else 32))))
    assert found.verdict == "none"


@pytest.mark.parametrize("numbers", [64, 1024])
def test_arrays_kept_in_a_list_are_a_leak(numbers: int) -> None:
    kept: list[mx.array] = []

    def step(number: int) -> None:
        mx.eval(_work(8 + number * 7 % 50))
        kept.append(mx.full((numbers,), float(number)))
        mx.eval(kept[-1])

    found = _verdict(_run(step, num_steps=300))
    assert found.verdict == "leak"
    assert found.bytes_per_step == pytest.approx(4 * numbers, rel=0.2)


def test_a_running_sum_that_is_never_evaluated_is_a_leak() -> None:
    total = [mx.array(0.0)]

    def step(number: int) -> None:
        hidden = mx.full((1000,), float(number))
        mx.eval(hidden)
        total[0] = total[0] + (hidden * 2).sum()

    found = _verdict(_run(step))
    assert found.verdict == "leak"
    assert found.bytes_per_step > 4000


def test_a_python_cache_that_grows_is_seen_in_the_memory_of_the_process() -> None:
    kept: dict[int, bytearray] = {}

    def step(number: int) -> None:
        kept[number] = bytearray(b"x" * 400_000)

    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else what other tests freed is filled first
    profiler = _run(step)
    assert _verdict(profiler).verdict == "none"
    found = _test(profiler.timeline()["rss_bytes"], floor=4096, share=0.01)
    assert found.verdict == "leak"
    assert found.bytes_per_step == pytest.approx(400_000, rel=0.2)


def test_buffers_cached_for_each_new_shape_are_a_leak_and_for_a_few_shapes_bounded() -> None:
    def run(num_shapes: int) -> LeakFigures:
        cache: dict[int, mx.array] = {}

        def step(number: int) -> None:
            shape = 1000 + number % num_shapes
            if shape not in cache:
                cache[shape] = mx.zeros((shape,))
                mx.eval(cache[shape])

        return _verdict(_run(step))

    assert run(1000).verdict == "leak"
    assert run(20).verdict == "bounded growth"


def test_a_compiled_variant_for_each_shape_that_holds_a_constant_is_a_leak() -> None:
    variants: dict[int, Any] = {}

    def variant(length: int) -> Any:
        table = mx.ones((length, 16))  # held by the function
        mx.eval(table)
        return mx.compile(lambda x: x @ table)

    def step(number: int) -> None:
        length = 16 + number
        variants[length] = variant(length)
        mx.eval(variants[length](mx.ones((1, length))))

    assert _verdict(_run(step)).verdict == "leak"
