"""AWQ on any architecture: which layers share scales, that scaling alone changes nothing, and what is gained."""

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks.architecture_configs import VOCAB_SIZE, config_of
from mlxflow.models import model_folder
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
def test_scaled_and_clipped_weights_lose_less_when_rounded(architecture: str, setting: Setting) -> None:
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
    scale_and_clip(model, plan, TOKENS, search_steps=10, watch=blocks.append)
    assert blocks == ["model.layers.0", "model.layers.1"]
    assert lost() < 0.9 * rounded


def test_a_block_without_improvement_is_left_unchanged() -> None:
    model = _model("llama")
    before = {name: mx.array(value) for name, value in tree_flatten(model.parameters())}
    plan = {"model.layers.0.mlp.up_proj": Setting("affine", 8, 32)}  # scaled alone, with nothing tried but ones
    scale_and_clip(model, plan, TOKENS, search_steps=1, watch=lambda _: None)
    assert all(mx.array_equal(value, before[name]) for name, value in tree_flatten(model.parameters()))


def test_calibration_restores_classes_and_frees_memory() -> None:
    model = _model("mixtral")
    kinds = [type(layer) for layer in model.modules()]
    plan = {"model.layers.1.self_attn.q_proj": Setting("affine", 4, 32)}
    mx.eval(model.parameters())
    limit = mx.set_cache_limit(0)
    try:
        scale_and_clip(model, plan, TOKENS, search_steps=2, watch=lambda _: None)
        gc.collect()  # of what other tests left
        before = mx.get_active_memory()
        scale_and_clip(model, plan, TOKENS, search_steps=2, watch=lambda _: None)
        gc.collect()
        assert mx.get_active_memory() == before
    finally:
        mx.set_cache_limit(limit)
    assert [type(layer) for layer in model.modules()] == kinds
