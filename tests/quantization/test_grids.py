import mlx.core as mx
import numpy as np
import pytest

from mlxflow.quantization import grids
from mlxflow.quantization.codec import unpack
from mlxflow.quantization.grids import codes_of, first_grid, grid_of, nearest, pack_on
from mlxflow.quantization.settings import Setting

SETTINGS = [
    Setting("affine", 2, 32),
    Setting("affine", 3, 64, narrows_scales=True),
    Setting("symmetric", 4, 32),
    Setting("mxfp4", 4, 32),
    Setting("nvfp4", 4, 16),
    Setting("mxfp8", 8, 32),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_codes_and_grid_of_a_packed_matrix_are_its_numbers(setting: Setting) -> None:
    weight = mx.array(np.random.default_rng(0).normal(0, 0.05, (6, 128)).astype(np.float32))
    grid = first_grid(weight, setting)
    packed = pack_on(weight, setting, grid)
    scales, biases = grid_of(packed, setting)[..., None]
    codes = codes_of(packed, setting).reshape(*scales.shape[:-1], -1)
    found = (codes * scales + biases).reshape(weight.shape)
    assert mx.allclose(found, unpack(packed, setting, mx.float32), rtol=1e-6, atol=1e-7)
    assert mx.array_equal(mx.stack([scales, biases]).squeeze(-1), grid.astype(mx.float32))
    # and these codes are the nearest ones
    positions = (weight.reshape(codes.shape) - biases) / scales
    assert np.abs(nearest(setting)(np.array(positions)) - np.array(codes)).mean() < 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_grid_that_is_searched_in_parts_is_that_of_the_whole(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = mx.array(np.random.default_rng(0).normal(0, 0.05, (3, 5, 128)).astype(np.float32))
    whole = first_grid(experts, setting)
    assert whole.shape == (2, 3, 5, 128 // setting.group_size)
    monkeypatch.setattr(grids, "_NUMBERS_AT_ONCE", 4 * 128)
    assert mx.array_equal(first_grid(experts, setting), whole)
