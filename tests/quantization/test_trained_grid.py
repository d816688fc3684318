import mlx.core as mx
import numpy as np
import pytest

from mlxflow.quantization.affine_grid import best_grid
from mlxflow.quantization.codec import pack, round_trip, symmetric_grid, unpack
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.trained_grid import GridLayer, Trained

FP32 = (mx.float32, mx.float32)


def _moved(trained: Trained) -> Trained:
    """Return arrays after some training."""
    random = np.random.default_rng(1)
    sizes = {"positions": 0.4, "stretch": 0.05, "shift": 0.1}
    return {
        name: array + mx.array(random.normal(size=array.shape).astype(np.float32)) * sizes[name]
        for name, array in trained.items()
    }


@pytest.mark.parametrize("setting", [Setting("affine", 3, 32), Setting("symmetric", 2, 32), Setting("affine", 4, 64)])
def test_before_training_the_codes_are_those_of_the_grid(setting: Setting) -> None:
    weight = mx.random.normal((16, 128), key=mx.random.key(0))
    grid = (symmetric_grid if setting.mode == "symmetric" else best_grid)(weight, setting)
    layer, trained = GridLayer.begin(weight, setting, grid, dtypes=FP32)
    expected = unpack(pack(weight, setting, grid), setting)
    assert mx.allclose(layer.weight(trained), expected, atol=1e-6)
    assert mx.allclose(unpack(layer.packed(trained), setting), expected, atol=1e-6)


@pytest.mark.parametrize("setting", [Setting("affine", 3, 32), Setting("symmetric", 2, 32)])
def test_the_packed_weight_is_the_trained_one(setting: Setting) -> None:
    weight = mx.random.normal((16, 128), key=mx.random.key(0))
    grid = (symmetric_grid if setting.mode == "symmetric" else best_grid)(weight, setting)
    layer, trained = GridLayer.begin(weight, setting, grid, dtypes=FP32)
    trained = _moved(trained)
    assert mx.allclose(unpack(layer.packed(trained), setting), layer.weight(trained), atol=1e-6)
    narrow = layer._replace(setting=setting._replace(narrows_scales=True)).packed(trained)
    assert narrow.scales.dtype == mx.bfloat16
    assert mx.array_equal(narrow.weight, layer.packed(trained).weight)


def test_gradients_are_those_of_fixed_codes() -> None:
    setting = Setting("affine", 2, 32)
    weight = mx.random.normal((4, 32), key=mx.random.key(0)) * 2
    layer, trained = GridLayer.begin(weight, setting, best_grid(weight, setting), dtypes=FP32)
    cotangent = mx.random.normal((4, 32), key=mx.random.key(1))
    gradients = mx.grad(lambda trained: (layer.weight(trained) * cotangent).sum())(trained)
    codes = mx.clip(mx.round(trained["positions"]), 0, 3)
    incoming = cotangent.reshape(codes.shape)
    assert mx.allclose(gradients["stretch"], (incoming * codes).sum(-1, keepdims=True) * layer.scales, atol=1e-5)
    assert mx.allclose(gradients["shift"], incoming.sum(-1, keepdims=True) * layer.scales, atol=1e-5)
    is_on = (trained["positions"] >= -0.5) & (trained["positions"] <= 3.5)
    assert 0 < int(is_on.sum()) < is_on.size
    assert mx.allclose(gradients["positions"], mx.where(is_on, incoming * layer.scales, 0))


def test_groups_of_equal_weights_stay_finite() -> None:
    setting = Setting("affine", 4, 32)
    weight = mx.concatenate([mx.zeros((2, 32)), mx.full((2, 32), 0.5)], axis=1)
    layer, trained = GridLayer.begin(weight, setting, best_grid(weight, setting), dtypes=FP32)
    assert mx.allclose(layer.weight(trained), round_trip(weight, setting), atol=1e-6)
