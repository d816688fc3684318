import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.profiling.profiler import MemoryProfiler
from mlxflow.profiling.step_memory import Peaks, ProfiledModel, predict, take_steps, trial
from mlxflow.profiling.suggestions import Situation, suggest
from mlxflow.training.settings import TrainingSettings
from tests.data.test_token_file_writer import Corpus
from tests.profiling.conftest import save_job
from tests.profiling.test_step_memory import SETTINGS


def _situation(
    peaks: Peaks, *, cache: int = 0, share: float = 1.0, packing: str = "best-fit", batch_size: int = 1 << 20
) -> Situation:
    return Situation(peaks, cache, share, is_gpu=False, packing=packing, batch_size=batch_size)


@pytest.mark.matrix
def test_a_suggested_setting_saves_what_was_predicted(job: ProfiledModel) -> None:
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


def test_the_suggested_fused_loss_saves_what_was_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxflow.training.objective._CHUNK_BYTES", {"cpu": 1 << 20, "gpu": 1 << 20})  # for few rows
    job, settings = save_job(tmp_path, vocab_size=4096, hidden_size=16), SETTINGS.replace(batch_size=16)
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


def test_suggested_packing_saves_what_was_predicted(job: ProfiledModel, tmp_path: Path) -> None:
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


def test_packing_is_suggested_for_an_odd_number_of_rows() -> None:
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


def test_settings_already_in_use_are_not_suggested() -> None:
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
            assert one.name != "checkpointing" or one.value == ("pairs" if every == 1 else "layers")
            assert one.name != "cache_limit" or int(one.value.removesuffix(" MiB")) << 20 < 1 << 28
    assert seen == {*_in_force(SETTINGS, "", 0), "cache_limit"}, "each was suggested somewhere"


def test_nothing_more_is_recomputed_than_all_layers_in_pairs() -> None:
    situation = _situation(Peaks(1e9, 1e6))
    settings = SETTINGS.replace(checkpoint_every=1, checkpoint_segment=2)
    found = suggest(ProfiledModel(Path(), "", 1, 1, 0), settings, situation, predicts=lambda *_: Peaks(1e6, 1e6))
    assert "checkpointing" not in {one.name for one in found}


def test_a_suggested_cache_limit_saves_what_was_predicted() -> None:
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
