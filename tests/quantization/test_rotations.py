from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

from benchmarks.architecture_configs import config_of
from mlxflow.data.token_file import Rows
from mlxflow.messages.errors import CallError
from mlxflow.models import model_folder
from mlxflow.quantization import rotation_choice
from mlxflow.quantization.rotation_choice import choose_rotation, require_rotatable
from mlxflow.quantization.rotations import Rotation, hadamard, logits_difference, obstacles
from mlxflow.quantization.settings import Setting

TOKENS = np.random.default_rng(0).integers(0, 128, (12, 33)).astype(np.uint16)
ROWS = Rows(TOKENS, np.full(TOKENS.shape, 3, np.uint8))


def _model(architecture: str = "llama", **changes: Any) -> nn.Module:
    """Return a model whose norms have weights of every size, and whose hidden states have outliers."""
    model = model_folder.build(config_of(architecture) | changes, seed=0)
    random = np.random.default_rng(3)

    def change(path: str, value: mx.array) -> mx.array:
        if value.ndim == 1:
            value = value + mx.array(random.uniform(-0.5, 0.5, value.shape).astype(np.float32))
        if path.endswith("embed_tokens.weight"):
            value[:, 3] = value[:, 3] * 30
        return value

    model.update(tree_map_with_path(change, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


@pytest.mark.parametrize("size", [16, 64, 576, 20, 1])
def test_a_hadamard_matrix_is_orthogonal_and_random(size: int) -> None:
    one, other = (hadamard(size, np.random.default_rng(seed)) for seed in (0, 1))
    assert mx.allclose(one @ one.T, mx.eye(size), atol=1e-5)
    assert size == 1 or not mx.array_equal(one, other)
    if size in (16, 64):
        assert mx.allclose(mx.abs(one), mx.full((size, size), size**-0.5))


@pytest.mark.parametrize(
    ("architecture", "residual", "heads"),
    [
        ("llama", "", ""),
        ("mixtral", "", ""),
        ("qwen3_moe", "", ""),
        ("phi3", "", "block 0 has no linear layer `self_attn.v_proj`"),
        (
            "qwen2",
            "its head is the embedding, and the weights of model.norm cannot be folded into one of them alone",
            "",
        ),
        ("gemma3_text", "model.layers.1.post_feedforward_layernorm is a norm of what a layer writes", ""),
        ("starcoder2", "model.norm subtracts the mean, which a rotation changes", ""),
        ("gpt_neox", "it has no `model.embed_tokens`", "block 0 has no linear layer `self_attn.v_proj`"),
    ],
)
def test_rotations_leave_the_logits_and_other_architectures_say_why_not(
    architecture: str, residual: str, heads: str
) -> None:
    model, rotated = _model(architecture), _model(architecture)
    assert obstacles(model) == (residual, heads)
    before = dict(tree_flatten(rotated.parameters()))
    Rotation(0, not residual, not heads).apply(rotated)
    assert logits_difference(model, rotated, mx.array(TOKENS[:1].astype(np.int32))) < 1e-5
    changed = {name for name, value in tree_flatten(rotated.parameters()) if not mx.array_equal(value, before[name])}
    assert bool(changed) == (not residual or not heads)
    assert any("embed_tokens" in name for name in changed) == (not residual)
    assert any(".v_proj" in name for name in changed) == (not heads)


def test_a_tied_model_whose_last_norm_has_no_weights_is_rotated() -> None:
    model, rotated = _model("qwen3"), _model("qwen3")
    for one in (model, rotated):
        one.model.norm.weight = mx.full(one.model.norm.weight.shape, 1.5)
    assert obstacles(model).residual == ""
    Rotation(1, residual=True, heads=True).apply(rotated)
    assert logits_difference(model, rotated, mx.array(TOKENS[:1].astype(np.int32))) < 1e-5


def _plan(model: nn.Module) -> dict[str, Setting]:
    return {path: Setting("affine", 3, 32) for path, one in model.named_modules() if hasattr(one, "to_quantized")}


def _chosen(load: Any, folder: Path, count: int = 3) -> rotation_choice.RotationChoice:
    name = f"quantize.rotations = {count}"
    return choose_rotation(load, _plan(load()), ROWS, count=count, seed=7, folder=folder, name=name, task="quantize")


def test_the_best_rotation_is_kept_if_the_rounded_model_diverges_less(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = _chosen(_model, tmp_path / "rotations")
    assert not list(tmp_path.iterdir())  # no codes are left
    figures = made.figures
    assert figures.is_kept
    assert made.rotation == Rotation(figures.seed, residual=True, heads=True)
    assert figures.parts == ("R1", "R2")
    assert figures.divergence == min(figures.divergences) < figures.divergence_without
    assert figures.seed == 7 + int(np.argmin(figures.divergences))
    assert len(set(figures.divergences)) == 3
    assert 0 < figures.logits_difference < 1e-5
    shown = capfd.readouterr().err
    assert f"{figures.divergence:.4g} nats with it, by {figures.divergence_without:.4g} without" in shown


def test_a_rotation_that_does_not_help_is_not_kept(tmp_path: Path) -> None:
    def load() -> nn.Module:
        """Return a model whose weights are on a grid of 3 bits already."""
        model = _model()
        for module in model.modules():
            if hasattr(module, "to_quantized"):
                codes = np.random.default_rng(5).integers(0, 8, module.weight.shape)
                codes[..., ::32], codes[..., 1::32] = 0, 7
                module.weight = mx.array(((codes - 4) * 0.03125).astype(np.float32))
        return model

    made = _chosen(load, tmp_path, 2)
    assert made.rotation is None
    assert not made.figures.is_kept
    assert made.figures.divergence >= made.figures.divergence_without


def test_a_model_that_cannot_be_rotated_is_refused_by_name() -> None:
    with pytest.raises(CallError) as caught:
        require_rotatable(_model("gpt_neox"), name="quantize.rotations = 2")
    assert str(caught.value) == (
        "quantize.rotations = 2: gpt_neox cannot be rotated: it has no `model.embed_tokens`; block 0 has no linear "
        "layer `self_attn.v_proj`. Set rotations = 0."
    )


def test_a_rotation_that_changes_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    apply = Rotation.apply

    def wrong(self: Rotation, model: nn.Module, **named: Any) -> None:
        apply(self, model, **named)
        model.layers[0].mlp.down_proj.weight = model.layers[0].mlp.down_proj.weight * 1.01

    monkeypatch.setattr(Rotation, "apply", wrong)
    with pytest.raises(CallError, match=r"a rotation changes the logits of llama by .*\. Set rotations = 0\."):
        _chosen(_model, tmp_path, 1)
