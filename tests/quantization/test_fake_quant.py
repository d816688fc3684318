from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.models import adapter_files
from mlxflow.quantization.affine_grid import best_grid
from mlxflow.quantization.clipping import best_limits
from mlxflow.quantization.codec import round_trip, symmetric_grid, unpack
from mlxflow.quantization.fake_quant import fake_quantized
from mlxflow.quantization.settings import Setting
from mlxflow.training import adapters
from mlxflow.training.objective import make_objective, plain_objective, uses_fused_loss
from mlxflow.training.settings import AdapterShape
from mlxflow.training.step import Step
from mlxflow.training.update import Update
from tests.conftest import rest_in_matrix
from tests.small_models import llama

SETTINGS = [
    Setting("affine", 4, 64),
    Setting("affine", 3, 32),
    Setting("symmetric", 2, 32),
    Setting("symmetric", 4, 64),
    Setting("mxfp4", 4, 32),
    Setting("nvfp4", 4, 16),
    Setting("mxfp8", 8, 32),
]


def _llama(dtype: mx.Dtype = mx.float32) -> nn.Module:
    model, _ = llama(vocab_size=60, hidden_size=128, num_layers=2, intermediate_size=192)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def _fake(module: nn.Module) -> mx.array:
    weight: mx.array = module.fake_weight()
    return weight


def _mixed(model: nn.Module) -> dict[str, Setting]:
    """Return a plan in which every setting has a layer, the tied embedding included."""
    paths = [path for path, module in model.named_modules() if hasattr(module, "to_quantized")]
    return {path: SETTINGS[place % len(SETTINGS)] for place, path in enumerate(sorted(paths))}


def _train(model: nn.Module, *, steps: int, has_masters: bool = False) -> None:
    update = Update(model, optim.AdamW(1e-3), max_grad_norm=1.0, has_masters=has_masters)
    step = Step(model, update, plain_objective(masks_documents=False))
    tokens = mx.random.randint(0, 60, (4, 17), key=mx.random.key(0))
    for _ in range(steps):
        mx.eval(step.update(step.compute(tokens, mx.full(tokens.shape, 3, mx.uint8))), step.state)


def _ends(weight: mx.array, setting: Setting) -> tuple[Any, Any]:
    """Return below and above what the weights of a group are cut off, (..., 1) each."""
    if setting.stored_mode != "affine":
        low, high = (np.array(one.astype(mx.float32)) for one in best_limits(weight, setting))
        return low, high
    grid = (symmetric_grid if setting.mode == "symmetric" else best_grid)(weight, setting)
    scales, biases = np.array(grid.astype(mx.float32))[..., None]
    ends = np.stack([biases - scales / 2, biases + scales * (2**setting.bits - 0.5)])
    return ends.min(axis=0), ends.max(axis=0)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_straight_through_gradient_is_zero_for_clipped_weights(setting: Setting, dtype: mx.Dtype) -> None:
    layer = nn.Linear(128, 32, bias=False)
    layer.set_dtype(dtype)
    x = mx.random.normal((8, 128), key=mx.random.key(1)).astype(dtype)
    towards = mx.random.normal((8, 32), key=mx.random.key(2)).astype(dtype)

    def loss(weights: Any) -> mx.array:
        layer.update(weights)
        made: mx.array = (layer(x) * towards).astype(mx.float32).sum()
        return made

    low, high = _ends(layer.weight, setting)
    groups = np.array(layer.weight.astype(mx.float32)).reshape(32, -1, setting.group_size)
    cut_off = ((groups < low) | (groups > high)).reshape(32, 128)
    assert cut_off.any() or setting.bits > 3
    with fake_quantized(nn.Sequential(layer), {"layers.0": setting}):
        weights = layer.trainable_parameters()
        gradient = mx.grad(loss)(weights)["weight"]
        layer.update(weights)
        assert mx.array_equal(layer(x), x @ _fake(layer).T)
    # d/dw of sum((x w^T) * t) is t^T x, whatever w was rounded to
    expected = np.where(cut_off, 0, np.array((towards.T @ x).astype(mx.float32)))
    assert np.allclose(np.array(gradient.astype(mx.float32)), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", rest_in_matrix([mx.float32, mx.bfloat16], mx.float32))
def test_the_exported_weights_are_those_of_the_last_forward_pass(dtype: mx.Dtype) -> None:
    model = _llama(dtype)
    plan = _mixed(model)
    tokens = mx.random.randint(0, 60, (2, 12), key=mx.random.key(3))
    before = dict(tree_flatten(model.parameters()))
    with fake_quantized(model, plan) as packed:
        _train(model, steps=3, has_masters=dtype == mx.bfloat16)
        modules = dict(model.named_modules())
        forward = {path: mx.array(_fake(modules[path])) for path in plan}
        compiled = mx.compile(lambda: [_fake(modules[path]) for path in plan], inputs=[model.state])()
        exported = {path: unpack(parts, plan[path], dtype) for path, parts in packed().items()}
        logits = model(tokens)
    for (path, weight), other in zip(forward.items(), compiled, strict=True):
        assert mx.array_equal(weight, exported[path]), path
        assert mx.array_equal(other, exported[path]), path
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    model.load_weights([(f"{path}.weight", weight) for path, weight in exported.items()], strict=False)
    assert mx.array_equal(model(tokens), logits)


def test_training_sees_the_quantized_weights_and_moves_the_dense_ones() -> None:
    model = _llama()
    before = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    with fake_quantized(model, _mixed(model)):
        _train(model, steps=1)
    for name, value in tree_flatten(model.parameters()):
        assert np.isfinite(np.array(value)).all()
        assert (np.array(value) != before[name]).mean() > 0.9, name


def test_only_planned_layers_are_fake_quantized_and_only_within_the_context() -> None:
    model = _llama()
    path = "model.layers.1.mlp.down_proj"
    kinds = {name: type(module) for name, module in model.named_modules()}
    with fake_quantized(model, {path: Setting("symmetric", 4, 64)}):
        changed = {name for name, module in model.named_modules() if type(module) is not kinds[name]}
    assert changed == {path}
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert "_grid" not in dict(model.named_modules())[path]


def test_the_fused_loss_takes_the_quantized_head() -> None:
    model = _llama()
    tokens = mx.random.randint(0, 60, (4, 17), key=mx.random.key(0))
    marks = mx.full(tokens.shape, 3, mx.uint8)
    dense = float(plain_objective(masks_documents=False)(model, tokens, marks)[0])
    with fake_quantized(model, {"model.embed_tokens": Setting("affine", 2, 64)}):
        assert uses_fused_loss(model, wanted=True, vocab_size=60, tokens=64)
        objective = make_objective(model, fused=True, vocab_size=60, masks_documents=False)
        plain = plain_objective(masks_documents=False)
        assert float(objective(model, tokens, marks)[0]) == pytest.approx(
            float(plain(model, tokens, marks)[0]), rel=1e-5
        )
        assert float(plain(model, tokens, marks)[0]) != pytest.approx(dense, rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_are_quantized_with_the_weights_they_lie_beside(method: Literal["lora", "dora"]) -> None:
    model = _llama()
    shape = AdapterShape(method=method, rank=4, scale=2.0, dropout=0.0, num_layers=0, keys=("mlp.*",))
    adapters.add_adapters(model, shape, seed=0, key="train.lora.keys")
    path, setting = "model.layers.0.mlp.up_proj", Setting("symmetric", 3, 64)
    tokens = mx.random.randint(0, 60, (2, 12), key=mx.random.key(3))
    base = np.array(dict(tree_flatten(model.parameters()))[f"{path}.linear.weight"])
    with fake_quantized(model, {path: setting}) as packed:
        _train(model, steps=3)
        logits = model(tokens)
        exported = unpack(packed()[path], setting, mx.float32)
    adapter_files.fuse(model)
    fused = dict(tree_flatten(model.parameters()))[f"{path}.weight"]
    assert not np.allclose(np.array(fused), base)
    model.load_weights([(f"{path}.weight", exported)], strict=False)
    assert np.allclose(np.array(model(tokens)), np.array(logits), atol=1e-5)
    assert not mx.array_equal(round_trip(mx.array(base), setting), exported)
