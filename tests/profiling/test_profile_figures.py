"""Figures of a profile from readings by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlxflow.profiling import profile_figures


def _timeline(num_steps: int, growth: int) -> dict[str, Any]:
    steps = np.arange(num_steps)
    names = ("active_memory_bytes", "peak_memory_bytes", "cache_memory_bytes", "rss_bytes", "available_bytes")
    return {"step": steps + 1} | dict.fromkeys(names, 10**6 + growth * steps)


def test_growth_is_in_bytes_per_step() -> None:
    assert profile_figures.trend(_timeline(9, 512)).active_memory_bytes_per_step == 512.0
    assert profile_figures.trend(_timeline(1, 512)).rss_bytes_per_step == 0.0


def test_few_steps_give_no_leak_verdict_for_the_process() -> None:
    found = profile_figures.leak(_timeline(39, 10**5), memory_limit_bytes=10**12)
    assert found.verdict == "leak"
    assert found.bytes_per_step == pytest.approx(10**5, rel=0.1)
    assert (found.process.verdict, found.process.note) == ("none", "40 steps are needed for a verdict")


def test_a_process_that_grows_leaks() -> None:
    found = profile_figures.leak(_timeline(60, 10**5), memory_limit_bytes=10**12)
    assert (found.process.verdict, found.process.note) == ("leak", None)
    assert found.process.steps_until_limit is not None


def test_the_step_time_is_the_median_of_its_passes() -> None:
    passes: Any = [SimpleNamespace(name=name, seconds=value) for name, value in (("training_step", 1.0), ("x", 9.0))]
    passes += [SimpleNamespace(name="training_step", seconds=value) for value in (2.0, 30.0)]
    assert profile_figures.median_step_seconds(passes) == 2.0


def test_phases_keep_their_order() -> None:
    total = SimpleNamespace(calls=2, seconds=1.5, peak_memory_bytes=3, growth_bytes=-1)
    totals: Any = {"b": total, "a": total}
    assert [one.name for one in profile_figures.phases(totals)] == ["b", "a"]
