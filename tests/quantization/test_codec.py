import mlx.core as mx
import numpy as np
import pytest

from mlxflow.quantization.codec import codes_on, is_supported, pack, packed_bytes, places_on, round_trip, unpack
from mlxflow.quantization.settings import Setting

SETTINGS = [
    *(Setting(mode, bits, 32) for mode in ("affine", "symmetric") for bits in (2, 3, 4, 8)),
    Setting("mxfp4", 4, 32),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_packed_bytes_are_those_of_the_packed_matrix(setting: Setting) -> None:
    weight = mx.random.normal((8, 64), key=mx.random.key(0))
    assert pack(weight, setting).nbytes == packed_bytes((8, 64), setting, mx.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_points_of_a_given_grid_are_packed_without_loss(bits: int) -> None:
    setting = Setting("affine", bits, 32)
    codes = mx.array(np.random.default_rng(0).integers(0, 2**bits, (4, 64)))
    grid = mx.stack([mx.full((4, 2), 0.25), mx.full((4, 2), -1.0)])
    weight = codes.astype(mx.float32) * 0.25 - 1
    assert mx.array_equal(unpack(pack(weight, setting, grid), setting), weight)
    groups = weight.reshape(4, 2, 32)
    assert mx.array_equal(codes_on(groups, grid, bits), codes.reshape(4, 2, 32).astype(mx.float32))


def test_codes_on_a_grid_with_scale_zero_are_zero() -> None:
    assert places_on(mx.ones((1, 4)), mx.zeros((2, 1))).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_codes_have_zero_on_the_grid(bits: int) -> None:
    weight = mx.random.normal((4, 64), key=mx.random.key(1)) + 1
    weight[:, ::7] = 0
    again = round_trip(weight, Setting("symmetric", bits, 32))
    assert mx.array_equal(again[:, ::7], weight[:, ::7])


def test_unknown_settings_are_not_supported() -> None:
    assert is_supported(Setting("affine", 4, 32))
    assert not is_supported(Setting("affine", 7, 32))


@pytest.mark.parametrize("mode", ["affine", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_narrow_scales_of_fp32_weights_do_not_add_to_the_error(mode: str, bits: int) -> None:
    weight = mx.random.normal((64, 256), key=mx.random.key(0))
    wide = Setting(mode, bits, 64)
    narrow = wide._replace(narrows_scales=True)
    packed = pack(weight, narrow)
    assert packed.scales.dtype == packed.biases.dtype == mx.bfloat16  # type: ignore[union-attr]
    assert packed.nbytes == packed_bytes((64, 256), narrow, mx.float32) < packed_bytes((64, 256), wide, mx.float32)
    errors = [float(mx.linalg.norm(round_trip(weight, setting) - weight)) for setting in (narrow, wide)]
    assert errors[0] < 1.01 * errors[1]


def test_scales_of_8_bits_and_of_16_bit_weights_keep_their_dtype() -> None:
    weight = mx.random.normal((8, 64), key=mx.random.key(0))
    assert pack(weight, Setting("affine", 8, 64, narrows_scales=True)).scales.dtype == mx.float32
    half = weight.astype(mx.float16)
    assert pack(half, Setting("affine", 4, 64, narrows_scales=True)).scales.dtype == mx.float16
