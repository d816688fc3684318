"""AWQ on any architecture: which layers share scales, that scaling alone changes nothing, and what is gained."""

import gc
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks.architecture_configs import VOCAB_SIZE, config_of
from mlxflow.device import phase_peaks
from mlxflow.models import model_folder
from mlxflow.quantization import block_slices
from mlxflow.quantization.awq import scale_and_clip
from mlxflow.quantization.codec import round_trip
from mlxflow.quantization.settings import Setting

TOKENS = mx.random.randint(0, VOCAB_SIZE, (8, 16), key=mx.random.key(0))


def _model(architecture: str) -> nn.Module:
    """Return a model whose activations differ in size by channel, as those of trained ones do."""
    model = model_folder.build(config_of(architecture), seed=0)
    model.eval()
    for path, layer in model.named_modules():
        if "weight" in layer and layer.weight.ndim == 1:
            key = mx.random.key(len(path))
            layer.weight = layer.weight + mx.exp(mx.random.normal(layer.weight.shape, key=key)) - 1
    return model


@pytest.mark.parametrize(
    ("architecture", "setting"),
    [
        ("llama", Setting("affine", 3, 32)),
        ("llama", Setting("symmetric", 3, 32)),
        ("phi3", Setting("nvfp4", 4, 16)),
        ("gemma2", Setting("affine", 2, 64)),
        ("cohere", Setting("affine", 3, 32)),
    ],
)
def test_scaled_and_clipped_weights_lose_less_when_rounded(architecture: str, setting: Setting, tmp_path: Path) -> None:
    model = _model(architecture)
    wanted = model(TOKENS)
    plan = {
        path: setting for path, layer in model.named_modules() if ".layers." in path and "to_quantized" in dir(layer)
    }
    plan = {path: one for path, one in plan.items() if dict(model.named_modules())[path].weight.shape[-1] % 32 == 0}

    def lost() -> float:
        modules = dict(model.named_modules())
        dense = {path: modules[path].weight for path in plan}
        for path, weight in dense.items():
            modules[path].weight = round_trip(weight, plan[path])
        found = model(TOKENS)
        for path, weight in dense.items():
            modules[path].weight = weight
        return float((found - wanted).square().mean())

    rounded = lost()
    blocks: list[str] = []
    scale_and_clip(model, plan, TOKENS, search_steps=10, folder=tmp_path / "inputs", watch=blocks.append)
    assert blocks == ["model.layers.0", "model.layers.1"]
    assert lost() < 0.9 * rounded


def test_a_block_without_improvement_is_left_unchanged(tmp_path: Path) -> None:
    model = _model("llama")
    before = {name: mx.array(value) for name, value in tree_flatten(model.parameters())}
    plan = {"model.layers.0.mlp.up_proj": Setting("affine", 8, 32)}  # scaled alone, with nothing tried but ones
    scale_and_clip(model, plan, TOKENS, search_steps=1, folder=tmp_path / "inputs", watch=lambda _: None)
    assert all(mx.array_equal(value, before[name]) for name, value in tree_flatten(model.parameters()))


def test_calibration_restores_classes_and_frees_memory_and_files(tmp_path: Path) -> None:
    model = _model("mixtral")
    kinds = [type(layer) for layer in model.modules()]
    plan = {"model.layers.1.self_attn.q_proj": Setting("affine", 4, 32)}
    mx.eval(model.parameters())
    limit = mx.set_cache_limit(0)
    try:
        scale_and_clip(model, plan, TOKENS, search_steps=2, folder=tmp_path / "inputs", watch=lambda _: None)
        gc.collect()  # of what other tests left
        before = mx.get_active_memory()
        scale_and_clip(model, plan, TOKENS, search_steps=2, folder=tmp_path / "inputs", watch=lambda _: None)
        gc.collect()
        assert mx.get_active_memory() == before
    finally:
        mx.set_cache_limit(limit)
    assert [type(layer) for layer in model.modules()] == kinds
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_rows_in_slices_give_the_weights_of_all_rows_at_once(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sliced = _model(architecture), _model(architecture)
    plan = {f"model.layers.0.self_attn.{name}_proj": Setting("affine", 3, 32) for name in "qkvo"}
    scale_and_clip(whole, plan, TOKENS, search_steps=6, folder=tmp_path / "inputs", watch=lambda _: None)
    monkeypatch.setattr(block_slices, "TOKENS_AT_ONCE", 3 * TOKENS.shape[1])  # 3, 3 and 2 of the 8 rows
    scale_and_clip(sliced, plan, TOKENS, search_steps=6, folder=tmp_path / "inputs", watch=lambda _: None)
    unscaled = dict(tree_flatten(_model(architecture).parameters()))
    changed = 0
    for (name, one), (_, other) in zip(*(tree_flatten(model.parameters()) for model in (whole, sliced)), strict=True):
        assert mx.allclose(one, other, rtol=1e-5, atol=1e-6), name  # sums over rows are added in another order
        changed += not mx.array_equal(one, unscaled[name])
    assert changed >= 4


def _peak_of_rows(count: int, folder: Path) -> int:
    """Return the peak of MLX's memory of a search on some rows of 16 tokens, besides that of the model."""
    model = model_folder.build(config_of("llama"), seed=0)
    model.eval()
    plan = {"model.layers.0.mlp.down_proj": Setting("affine", 4, 32)}
    tokens = mx.random.randint(0, VOCAB_SIZE, (count, 16), key=mx.random.key(0))
    mx.eval(model.parameters(), tokens)
    gc.collect()
    before = mx.get_active_memory()
    with phase_peaks.followed() as peak:
        scale_and_clip(model, plan, tokens, search_steps=2, folder=folder, watch=lambda _: None)
    return peak.bytes - before


def test_memory_grows_with_the_rows_by_hidden_states_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_slices, "TOKENS_AT_ONCE", 256)
    few, many = (_peak_of_rows(count, tmp_path / "inputs") for count in (64, 320))
    hidden = 4 * (320 - 64) * 16 * config_of("llama")["hidden_size"]
    assert many - few < 1.5 * hidden, (few, many, hidden)  # all inputs of a block at once: 30 times as much
