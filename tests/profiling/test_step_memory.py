"""Predictions of memory, held against what is then measured."""

import resource
import sys
import threading

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from mlxflow.profiling.profiler import MemoryProfiler
from mlxflow.profiling.step_memory import ProfiledModel, blank_rows, take_steps, trial
from mlxflow.training.settings import TrainingSettings

SETTINGS = TrainingSettings(batch_size=32, optimizer_options={}, workers=2)


def test_the_breakdown_of_a_real_steps_peak_adds_up(job: ProfiledModel) -> None:
    before = mx.get_active_memory()
    measured = take_steps(job, blank_rows(32, 32), SETTINGS, profiler := MemoryProfiler(), num_steps=2)
    parts = msgspec.structs.asdict(measured.composition)
    assert parts["total_bytes"] == sum(value for name, value in parts.items() if name != "total_bytes")
    assert parts["weights_bytes"] == parts["gradients_bytes"] == measured.model_bytes
    assert parts["optimizer_bytes"] == pytest.approx(2 * measured.model_bytes, rel=0.01)
    assert parts["logits_bytes"] >= 32 * 32 * 1000 * 4
    assert parts["activations_bytes"] > 32 * 32 * 32 * 4
    in_mlx = sum(parts[f"{name}_bytes"] for name in ARRAYS)
    assert in_mlx == profiler.timeline()["peak_memory_bytes"].max()
    highest_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if mx.default_device() == mx.cpu:
        # the kernel's high mark lags behind by some pages of each thread
        assert parts["total_bytes"] <= 1.01 * max(highest_bytes, in_mlx), "more than the process ever took"
    assert in_mlx - before == pytest.approx(measured.peaks.whole, rel=0.01)


@pytest.mark.parametrize("fused", [False, True])
def test_measured_steps_leave_no_memory_allocated(job: ProfiledModel, *, fused: bool) -> None:
    # a buffer from MLX's cache counts by its own size, not by what was asked for: without one, active memory is exact
    before = mx.set_cache_limit(0)
    try:
        profiler = MemoryProfiler()
        take_steps(job, blank_rows(8, 32), SETTINGS.replace(batch_size=8, fused_loss=fused), profiler, num_steps=12)
    finally:
        mx.set_cache_limit(before)
    assert np.ptp(profiler.timeline()["active_memory_bytes"]) == 0


ARRAYS = ("weights", "optimizer", "data", "logits", "gradients", "activations", "update")


def test_a_measurement_disturbed_by_freed_memory_is_repeated(job: ProfiledModel) -> None:
    alone = trial(job, SETTINGS).whole
    held = [mx.ones((1 << 20,))]
    mx.eval(held)
    giver = threading.Timer(0.05, held.clear)  # while the steps run
    giver.start()
    try:
        assert trial(job, SETTINGS).whole == pytest.approx(alone, rel=0.01)
    finally:
        giver.join()
