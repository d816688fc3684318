import mlx.core as mx
import numpy as np
import pytest

from mlxflow.quantization.affine_grid import best_grid
from mlxflow.quantization.codec import round_trip, unpack
from mlxflow.quantization.grids import codes_of, first_grid, pack_on
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.trained_grid import GridLayer, Trained

FP32 = (mx.float32, mx.float32)

INTEGERS = [Setting("affine", 3, 32), Setting("symmetric", 2, 32)]
FLOATS = [Setting("mxfp4", 4, 32), Setting("nvfp4", 4, 16), Setting("mxfp8", 8, 32)]


def _moved(trained: Trained) -> Trained:
    """Return arrays after some training."""
    random = np.random.default_rng(1)
    sizes = {"positions": 0.4, "stretch": 0.05, "shift": 0.1}
    return {
        name: array + mx.array(random.normal(size=array.shape).astype(np.float32)) * sizes[name]
        for name, array in trained.items()
    }


@pytest.mark.parametrize("setting", [*INTEGERS, Setting("affine", 4, 64), *FLOATS])
def test_before_training_the_codes_are_those_of_the_grid(setting: Setting) -> None:
    weight = mx.random.normal((16, 128), key=mx.random.key(0))
    grid = first_grid(weight, setting)
    layer, trained = GridLayer.begin(weight, setting, grid, dtypes=FP32)
    expected = unpack(pack_on(weight, setting, grid), setting, mx.float32)
    assert mx.allclose(layer.weight(trained), expected, atol=1e-6)
    assert mx.allclose(unpack(layer.packed(trained), setting, mx.float32), expected, atol=1e-6)


@pytest.mark.parametrize("setting", [*INTEGERS, *FLOATS])
def test_the_packed_weight_is_the_trained_one(setting: Setting) -> None:
    weight = mx.random.normal((16, 128), key=mx.random.key(0))
    grid = first_grid(weight, setting)
    layer, trained = GridLayer.begin(weight, setting, grid, dtypes=FP32)
    trained = _moved(trained)
    assert mx.allclose(unpack(layer.packed(trained), setting, mx.float32), layer.weight(trained), atol=1e-6)
    if setting in FLOATS:
        return
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


@pytest.mark.parametrize("setting", [*INTEGERS, *FLOATS])
def test_training_begins_with_the_codes_of_a_packed_matrix(setting: Setting) -> None:
    weight = mx.random.normal((16, 128), key=mx.random.key(0))
    packed = pack_on(weight, setting, first_grid(weight, setting) * mx.array([0.5, 0.5])[:, None, None])
    layer, trained = GridLayer.of_packed(packed, setting, dtypes=FP32)
    again = layer.packed(trained)
    assert mx.array_equal(again.weight, packed.weight)
    assert mx.array_equal(again.scales, packed.scales)
    assert mx.allclose(layer.weight(trained), unpack(packed, setting, mx.float32), atol=1e-6)
    assert mx.array_equal(trained["positions"].reshape(16, 128), codes_of(packed, setting))


def test_groups_of_equal_weights_stay_finite() -> None:
    setting = Setting("affine", 4, 32)
    weight = mx.concatenate([mx.zeros((2, 32)), mx.full((2, 32), 0.5)], axis=1)
    layer, trained = GridLayer.begin(weight, setting, best_grid(weight, setting), dtypes=FP32)
    assert mx.allclose(layer.weight(trained), round_trip(weight, setting), atol=1e-6)
