import gc
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.quantization import mlx_lm_patches, scale_tuning
from mlxflow.quantization.apply import apply_plan
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.scale_tuning import TunedScales, tune_scales
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.teacher_logits import cached_teacher
from mlxflow.quantization.tuning_saves import TuningSaves
from tests.quantization.test_teacher_logits import all_rows
from tests.small_models import llama

TOKENS = np.random.default_rng(0).integers(0, 50, (64, 8))


NOT_SAVED = TuningSaves(None, "", task="quantize", total=0)


def _model(num_layers: int = 2) -> nn.Module:
    model, _ = llama(hidden_size=64, intermediate_size=64, num_heads=2, num_layers=num_layers)
    model.eval()
    return model


def _plan(mode: str = "affine", num_layers: int = 2) -> dict[str, Setting]:
    """Return a plan whose blocks have a mode."""
    modes = {path: mode if ".layers." in path else "affine" for path in quantizable_layers(_model(num_layers))}
    return {path: Setting(one, 2, 32, narrows_scales=True) for path, one in modes.items()}


def _tuned(
    folder: Path, mode: str = "affine", num_steps: int = 60, num_layers: int = 2, saves: TuningSaves | None = None
) -> tuple[TunedScales, nn.Module, nn.Module]:
    """Return the result, the tuned model, and one that is only rounded."""
    student, rounded, plan = _model(num_layers), _model(num_layers), _plan(mode, num_layers)
    for model in (student, rounded):
        apply_plan(model, plan)
        model.eval()
    teacher = cached_teacher(
        lambda: _model(num_layers),
        all_rows(TOKENS[:48]),
        masks_documents=False,
        num_likeliest=16,
        file=folder / "one.safetensors",
        metadata={},
    )
    made = tune_scales(
        student, plan, TOKENS[:48], teacher, num_steps=num_steps, batch_size=8, seed=0, saves=saves or NOT_SAVED
    )
    return made, student, rounded


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU computes in the stored dtype")
def test_a_cpu_tunes_scales_of_16_bits_with_products_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[mx.Dtype] = []
    call = mlx_lm_patches._DenseProductLinear.__call__

    def noting_call(self: nn.Module, x: mx.array) -> mx.array:
        seen.append(x.dtype)
        return call(self, x)

    monkeypatch.setattr(mlx_lm_patches._DenseProductLinear, "__call__", noting_call)
    tuned, _, _ = _tuned(tmp_path, num_steps=2)
    assert {tuned.packed["model.layers.0.mlp.up_proj"].scales.dtype} == {mx.bfloat16}  # narrow scales of fp32 weights
    assert set(seen) == {mx.float32}


def _kl(model: nn.Module) -> float:
    tokens = mx.array(TOKENS[48:])
    logs = [one - mx.logsumexp(one, axis=-1, keepdims=True) for one in (_model()(tokens), model(tokens))]
    return float((mx.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


def test_tuned_scales_are_nearer_to_the_dense_model_on_other_rows(tmp_path: Path) -> None:
    made, student, rounded = _tuned(tmp_path)
    assert made.last_loss < 0.9 * made.first_loss
    assert _kl(student) < 0.95 * _kl(rounded)


def test_blocks_are_recomputed_with_the_same_result_in_less_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tuned(folder: str) -> tuple[TunedScales, int]:
        gc.collect()
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        made, *_ = _tuned(tmp_path / folder, num_steps=3, num_layers=8)
        return made, mx.get_peak_memory() - held

    recomputed, least = tuned("one")
    monkeypatch.setattr(scale_tuning, "recomputing_blocks", lambda _: nullcontext())
    whole, most = tuned("other")
    assert least < 0.7 * most
    assert recomputed.last_loss == pytest.approx(whole.last_loss, rel=1e-4)
    for path, packed in recomputed.packed.items():
        ours, theirs = (one.scales.astype(mx.float32) for one in (packed, whole.packed[path]))
        assert mx.allclose(ours, theirs, rtol=1e-2, atol=1e-4), path


def test_codes_and_dtypes_stay(tmp_path: Path) -> None:
    made, _, rounded = _tuned(tmp_path, num_steps=2)
    layers = dict(rounded.named_modules())
    for path, packed in made.packed.items():
        assert mx.array_equal(packed.weight, layers[path].weight)
        assert packed.scales.dtype == layers[path].scales.dtype == mx.bfloat16
        assert not mx.array_equal(packed.scales, layers[path].scales)


def test_an_interrupted_tuning_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, _, _ = _tuned(tmp_path, num_steps=12)

    def saves() -> TuningSaves:
        return TuningSaves(tmp_path / "run", "1", task="quantize", total=12)

    def interrupt(losses: Sequence[float]) -> None:
        if len(losses) == 5:
            raise KeyboardInterrupt

    first = saves()
    first.watched_by(interrupt)
    with pytest.raises(KeyboardInterrupt):
        _tuned(tmp_path, num_steps=12, saves=first)
    second, seen = saves(), []
    assert second.first == 5
    second.watched_by(lambda losses: seen.append(len(losses)))
    tuned, _, _ = _tuned(tmp_path, num_steps=12, saves=second)
    assert seen == list(range(6, 13))
    assert tuned[1:] == whole[1:]
    for path, codes in whole.packed.items():
        for own, other in zip(codes, tuned.packed[path], strict=True):
            assert own is not None
            assert other is not None
            assert mx.array_equal(own, other), path


def test_a_fixed_zero_point_is_kept(tmp_path: Path) -> None:
    made, _, rounded = _tuned(tmp_path, "symmetric", num_steps=2)
    layers = dict(rounded.named_modules())
    kept = {path for path, one in made.packed.items() if mx.array_equal(one.scales, layers[path].scales)}
    assert kept == {path for path in made.packed if ".layers." in path}
