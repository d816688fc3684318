import mlx.core as mx
import numpy as np
import pytest

from mlxflow.quantization.codec import pack, round_trip, unpack
from mlxflow.quantization.float_grid import (
    best_scales,
    decoded_scales,
    elements,
    pack_elements,
    round_elements,
    stored_scales,
)
from mlxflow.quantization.settings import GROUP_SIZES, Setting

SETTINGS = [Setting("mxfp4", 4, 32), Setting("nvfp4", 4, 16), Setting("mxfp8", 8, 32)]


def _weight(scale: float = 0.05) -> mx.array:
    return mx.array(np.random.default_rng(0).standard_t(4, (8, 128)).astype(np.float32) * scale)


@pytest.mark.parametrize("setting", SETTINGS)
def test_codes_on_mlx_scales_are_mlx_codes(setting: Setting) -> None:
    weight = _weight()
    plain = pack(weight, setting)
    scales = decoded_scales(plain.scales, setting)
    positions = (weight.reshape(8, -1, setting.group_size) / scales[..., None]).reshape(weight.shape)
    packed = pack_elements(positions, scales, setting)
    assert mx.array_equal(packed.scales, plain.scales)
    assert mx.array_equal(unpack(packed, setting, mx.float32), unpack(plain, setting, mx.float32))


@pytest.mark.parametrize("setting", SETTINGS)
def test_packed_elements_are_what_mlx_unpacks(setting: Setting) -> None:
    weight = _weight()
    scales = best_scales(weight, setting)
    groups = weight.reshape(8, -1, setting.group_size)
    expected = round_elements(groups / scales[..., None], setting.mode) * scales[..., None]
    packed = pack_elements((groups / scales[..., None]).reshape(weight.shape), scales, setting)
    assert mx.array_equal(unpack(packed, setting, mx.float32), expected.reshape(weight.shape))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("scale", [1e-3, 0.05, 30.0])
def test_best_scales_are_stored_ones_and_lose_no_more_than_mlx(setting: Setting, scale: float) -> None:
    weight = _weight(scale)
    scales = best_scales(weight, setting)
    assert mx.array_equal(stored_scales(scales, setting), scales)
    groups = weight.reshape(8, -1, setting.group_size)
    rounded = (round_elements(groups / scales[..., None], setting.mode) * scales[..., None]).reshape(weight.shape)
    lost, plain = (float((one - weight).square().sum()) for one in (rounded, round_trip(weight, setting)))
    assert lost <= plain
    if setting.mode != "mxfp8":
        assert lost < 0.99 * plain


@pytest.mark.parametrize("mode", sorted(GROUP_SIZES.keys() - {"affine", "symmetric"}))
def test_elements_are_rounded_to_the_nearest(mode: str) -> None:
    values = elements(mode)
    assert np.array_equal(np.array(round_elements(mx.array(values), mode)), values)
    positions = np.random.default_rng(0).uniform(1.2 * values[0], 1.2 * values[-1], 5000).astype(np.float32)
    nearest = values[np.abs(positions[:, None] - values).argmin(axis=1)]
    assert np.array_equal(np.array(round_elements(mx.array(positions), mode)), nearest)
