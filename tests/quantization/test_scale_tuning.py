from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflow.quantization.apply import apply_plan
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.scale_tuning import TunedScales, tune_scales
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.teacher_logits import cached_teacher
from tests.quantization.test_teacher_logits import all_rows
from tests.small_models import llama

TOKENS = np.random.default_rng(0).integers(0, 50, (64, 8))


def _model() -> nn.Module:
    model, _ = llama(hidden_size=64, intermediate_size=64, num_heads=2)
    model.eval()
    return model


def _plan(mode: str = "affine") -> dict[str, Setting]:
    """Return a plan whose blocks have a mode."""
    modes = {path: mode if ".layers." in path else "affine" for path in quantizable_layers(_model())}
    return {path: Setting(one, 2, 32, narrows_scales=True) for path, one in modes.items()}


def _tuned(folder: Path, mode: str = "affine", num_steps: int = 60) -> tuple[TunedScales, nn.Module, nn.Module]:
    """Return the result, the tuned model, and one that is only rounded."""
    student, rounded, plan = _model(), _model(), _plan(mode)
    for model in (student, rounded):
        apply_plan(model, plan)
        model.eval()
    teacher = cached_teacher(
        _model,
        all_rows(TOKENS[:48]),
        masks_documents=False,
        num_likeliest=16,
        file=folder / "one.safetensors",
        metadata={},
    )
    made = tune_scales(
        student, plan, TOKENS[:48], teacher, num_steps=num_steps, batch_size=8, seed=0, watch=lambda *_: None
    )
    return made, student, rounded


def _kl(model: nn.Module) -> float:
    tokens = mx.array(TOKENS[48:])
    logs = [one - mx.logsumexp(one, axis=-1, keepdims=True) for one in (_model()(tokens), model(tokens))]
    return float((mx.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


def test_tuned_scales_are_nearer_to_the_dense_model_on_other_rows(tmp_path: Path) -> None:
    made, student, rounded = _tuned(tmp_path)
    assert made.last_loss < 0.9 * made.first_loss
    assert _kl(student) < 0.95 * _kl(rounded)


def test_codes_and_dtypes_stay(tmp_path: Path) -> None:
    made, _, rounded = _tuned(tmp_path, num_steps=2)
    layers = dict(rounded.named_modules())
    for path, packed in made.packed.items():
        assert mx.array_equal(packed.weight, layers[path].weight)
        assert packed.scales.dtype == layers[path].scales.dtype == mx.bfloat16
        assert not mx.array_equal(packed.scales, layers[path].scales)


def test_a_fixed_zero_point_is_kept(tmp_path: Path) -> None:
    made, _, rounded = _tuned(tmp_path, "symmetric", num_steps=2)
    layers = dict(rounded.named_modules())
    kept = {path for path, one in made.packed.items() if mx.array_equal(one.scales, layers[path].scales)}
    assert kept == {path for path in made.packed if ".layers." in path}
