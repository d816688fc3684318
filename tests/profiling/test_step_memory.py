"""Predictions of memory, held against what is then measured."""

import itertools
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.models import model_folder
from mlxflow.profiling.memory_model import fit_law, held_chunk, measure_points, shapes_to_measure
from mlxflow.profiling.peak_breakdown import compose
from mlxflow.profiling.profiler import MemoryProfiler
from mlxflow.profiling.step_memory import Peaks, ProfiledModel, blank_rows, predict, take_steps, trial
from mlxflow.profiling.suggestions import Situation, suggest
from mlxflow.training.settings import TrainingSettings
from tests.data.test_token_file_writer import Corpus
from tests.small_models import llama

SETTINGS = TrainingSettings(batch_size=32, optimizer_options={}, workers=2)


def _situation(
    peaks: Peaks, *, cache: int = 0, share: float = 1.0, packing: str = "best-fit", batch_size: int = 1 << 20
) -> Situation:
    return Situation(peaks, cache, share, is_gpu=False, packing=packing, batch_size=batch_size)


def _job(folder: Path, *, vocab_size: int, hidden_size: int) -> ProfiledModel:
    model, config = llama(vocab_size=vocab_size, context_length=32, hidden_size=hidden_size, intermediate_size=64)
    files = {"config_file": folder / "config.json", "model_file": folder / "model.safetensors"}
    model_folder.save(model=model, config=config, provenance={}, **files)
    return ProfiledModel(folder, "profile.input", vocab_size, 32, 0)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> ProfiledModel:
    return _job(tmp_path_factory.mktemp("model"), vocab_size=1000, hidden_size=32)


def test_each_suggestion_saves_what_it_said_when_it_is_applied(job: ProfiledModel) -> None:
    now = trial(job, SETTINGS)
    found = {one.name: one for one in suggest(job, SETTINGS, _situation(now, cache=8 << 20))}
    applied = {
        "batch_size": SETTINGS.replace(batch_size=16, grad_accum_steps=2),
        "checkpointing": SETTINGS.replace(checkpoint_every=1),
    }
    for name, settings in applied.items():
        saved = now.whole - trial(job, settings).whole
        assert found[name].saves_bytes == pytest.approx(saved, rel=0.15), name
    savings = [one.saves_bytes for one in found.values()]
    assert savings == sorted(savings, reverse=True)
    assert "cache_limit" in found
    savings = [one.saves_bytes for one in found.values()]
    assert savings == sorted(savings, reverse=True)


def test_the_fused_loss_saves_what_was_said_when_it_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxflow.training.objective._CHUNK_BYTES", {"cpu": 1 << 20, "gpu": 1 << 20})  # for few rows
    job, settings = _job(tmp_path, vocab_size=4096, hidden_size=16), SETTINGS.replace(batch_size=16)
    now = trial(job, settings)
    (one,) = suggest(job, settings, _situation(now), predicts=_only("fused_loss", settings))
    assert one.name == "fused_loss"
    saved = now.whole - trial(job, settings.replace(fused_loss=True)).whole
    assert saved > 0.1 * now.whole
    assert one.saves_bytes == pytest.approx(saved, rel=0.15)


def _only(name: str, now: TrainingSettings) -> Callable[[ProfiledModel, TrainingSettings], Peaks]:
    """Return what predicts one change by trials and says of the others that they save nothing."""

    def predicts(job: ProfiledModel, settings: TrainingSettings) -> Peaks:
        is_changed = getattr(settings, name) != getattr(now, name)
        return predict(job, settings) if is_changed else Peaks(1e18, 0.0)

    return predicts


def test_packing_saves_what_was_said_when_the_documents_are_really_packed(job: ProfiledModel, tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, 6, longest=28)
    told = {"capacity": job.context_length + 1}
    padded, packed = (
        corpus.write(tmp_path / f"{packing}.safetensors", packing=packing, **told)[0].rows
        for packing in ("none", "best-fit")
    )
    # a document of one token is no row of its own: there is nothing to learn in it
    assert (padded.marks[:, 1:] & 1).sum() == (packed.marks[:, 1:] & 1).sum()
    assert packed.num_rows < 0.7 * padded.num_rows

    def peaks(rows: Rows) -> Peaks:
        profiler = MemoryProfiler()
        settings = SETTINGS.replace(batch_size=rows.num_rows)
        return take_steps(job, rows, settings, profiler, num_steps=4).peaks

    now = peaks(padded)
    share = np.count_nonzero(padded.marks) / padded.marks.size
    settings = SETTINGS.replace(batch_size=padded.num_rows)
    found = suggest(job, settings, _situation(now, share=share, packing="none"), predicts=_only("batch_size", settings))
    (one,) = (one for one in found if one.name == "packing")
    assert one.saves_bytes == pytest.approx(now.whole - peaks(packed).whole, rel=0.15)


def test_packing_is_suggested_for_an_odd_number_of_rows_too() -> None:
    def predicts(job: ProfiledModel, settings: TrainingSettings) -> Peaks:
        return Peaks(100.0 * settings.batch_size, 50.0)

    situation = _situation(Peaks(700, 50), share=0.5, packing="none")
    job, settings = ProfiledModel(Path(), "", 1, 1, 0), SETTINGS.replace(batch_size=7)
    found = {one.name: one.saves_bytes for one in suggest(job, settings, situation, predicts=predicts)}
    assert found == {"packing": 350}  # half of the rows


def _in_force(settings: TrainingSettings, packing: str, batch_size: int) -> dict[str, object]:
    """Return the keys of training that suggestions may name, as they are."""
    return {
        "batch_size": batch_size,
        "grad_accum_steps": settings.grad_accum_steps,
        "fused_loss": settings.fused_loss,
        "checkpointing": "layers" if settings.checkpoint_every == 1 else settings.checkpoint_every or "none",
        "precision": settings.precision,
        "packing": packing,
    }


def test_nothing_is_suggested_that_is_so_already() -> None:
    job = ProfiledModel(Path(), "", 1, 1, 0)
    choices = itertools.product(
        (1, 7, 8, 32), (1, 2), ("fp32", "bf16"), (0, 1, 2), (False, True), ("none", "concat", "best-fit"), (1, 4, 64)
    )
    seen = set()
    for size, passes, precision, every, fused, packing, trained_size in choices:
        settings = TrainingSettings(
            batch_size=size,
            grad_accum_steps=passes,
            precision=cast("Literal['fp32', 'bf16']", precision),
            checkpoint_every=every,
            fused_loss=fused,
        )
        situation = Situation(Peaks(1e9, 1e6), 1 << 28, 0.5, is_gpu=True, packing=packing, batch_size=trained_size)
        found = suggest(job, settings, situation, predicts=lambda *_: Peaks(1e6, 1e6))
        in_force = _in_force(settings, packing, trained_size)
        for one in found:
            seen.add(one.name)
            assert one.value != in_force.get(one.name), one
            assert one.name != "batch_size" or one.value < trained_size, "more rows save nothing"
            assert one.name != "checkpointing" or every == 0
            assert one.name != "cache_limit" or int(one.value.removesuffix(" MiB")) << 20 < 1 << 28
    assert seen == {*_in_force(SETTINGS, "", 0), "cache_limit"}, "each was suggested somewhere"


def test_a_lower_cache_limit_saves_what_was_said() -> None:
    def cached() -> int:
        mx.clear_cache()
        arrays = [mx.zeros((1 << 18,)) for _ in range(16)]  # 1 MiB each
        mx.eval(arrays)
        del arrays
        return mx.get_cache_memory()

    before = cached()
    situation = _situation(Peaks(0, 0), cache=before)
    one = suggest(ProfiledModel(Path(), "", 1, 1, 0), SETTINGS, situation, predicts=lambda *_: Peaks(0, 0))[0]
    assert one.name == "cache_limit"
    old = mx.set_cache_limit(int(one.value.removesuffix(" MiB")) << 20)
    try:
        assert before - cached() == pytest.approx(one.saves_bytes, rel=0.15)
    finally:
        mx.set_cache_limit(old)


def test_what_fits_is_predicted_within_a_tenth(job: ProfiledModel) -> None:
    chunk = held_chunk(job, SETTINGS)
    *points, judge = measure_points(job, SETTINGS, shapes_to_measure(16, 32, chunk=chunk))
    law = fit_law(points, chunk=chunk)
    others = measure_points(job, SETTINGS, [(32, 32), (8, 128)])
    for size, length, peaks in [judge, *others]:
        assert law.peak_bytes(size, length) == pytest.approx(peaks.whole, rel=0.1)
    most = law.largest_batch_size(32, round(law.peak_bytes(40, 32)) + 1)
    assert most == 40
    assert law.largest_batch_size(32, 10) == 0


def test_the_peak_of_real_steps_is_taken_apart_whole(job: ProfiledModel) -> None:
    before = mx.get_active_memory()
    measured = take_steps(job, blank_rows(32, 32), SETTINGS, profiler := MemoryProfiler(), num_steps=2)
    parts = measured.composition
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
def test_steps_leave_nothing_behind(job: ProfiledModel, *, fused: bool) -> None:
    # a buffer from MLX's cache counts by its own size, not by what was asked for: without one, active memory is exact
    before = mx.set_cache_limit(0)
    try:
        profiler = MemoryProfiler()
        take_steps(job, blank_rows(8, 32), SETTINGS.replace(batch_size=8, fused_loss=fused), profiler, num_steps=12)
    finally:
        mx.set_cache_limit(before)
    assert np.ptp(profiler.timeline()["active_memory_bytes"]) == 0


def test_a_peak_in_the_update_has_no_logits() -> None:
    known = dict.fromkeys(("weights_bytes", "optimizer_bytes", "data_bytes", "logits_bytes", "gradients_bytes"), 10)
    parts = compose(known, peak_memory_bytes=55, reserved_bytes=58, process_bytes=65, lies_in_update=True)
    assert (parts["logits_bytes"], parts["activations_bytes"], parts["update_bytes"]) == (0, 0, 15)
    assert (parts["cache_bytes"], parts["other_bytes"], parts["total_bytes"]) == (3, 7, 65)


ARRAYS = ("weights", "optimizer", "data", "logits", "gradients", "activations", "update")


@pytest.mark.parametrize("lies_in_update", [False, True])
@pytest.mark.parametrize("process_bytes", [0, 30, 55, 65])
@pytest.mark.parametrize("reserved_bytes", [20, 55, 60])
@pytest.mark.parametrize("known", [1, 10, 100])
def test_the_parts_add_up_to_the_peak_and_freed_memory_counts_once(
    known: int, reserved_bytes: int, process_bytes: int, *, lies_in_update: bool
) -> None:
    names = ("weights_bytes", "optimizer_bytes", "data_bytes", "logits_bytes", "gradients_bytes")
    parts = compose(
        dict.fromkeys(names, known),
        peak_memory_bytes=55,
        reserved_bytes=reserved_bytes,
        process_bytes=process_bytes,
        lies_in_update=lies_in_update,
    )
    assert min(parts.values()) >= 0
    assert sum(parts[f"{name}_bytes"] for name in ARRAYS) == 55
    assert parts.pop("total_bytes") == sum(parts.values()) == max(55, reserved_bytes, process_bytes)


def test_a_trial_beside_which_memory_is_given_back_is_taken_again(job: ProfiledModel) -> None:
    alone = trial(job, SETTINGS).whole
    held = [mx.ones((1 << 20,))]
    mx.eval(held)
    giver = threading.Timer(0.05, held.clear)  # while the steps run
    giver.start()
    try:
        assert trial(job, SETTINGS).whole == pytest.approx(alone, rel=0.01)
    finally:
        giver.join()
