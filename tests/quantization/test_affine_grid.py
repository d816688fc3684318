import mlx.core as mx
import pytest

from mlxflow.quantization.affine_grid import best_grid, round_on, where_on
from mlxflow.quantization.codec import pack, round_trip, symmetric_grid, unpack
from mlxflow.quantization.settings import BITS, Setting
from tests.quantization.matrices import awkward, errors

SETTINGS = [*(Setting("affine", bits, 64) for bits in BITS["affine"]), Setting("affine", 3, 32)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_no_group_loses_more_than_on_the_grid_of_mlx(setting: Setting, dtype: mx.Dtype) -> None:
    weight = awkward().astype(dtype)
    grid = best_grid(weight, setting)
    assert grid.dtype == dtype
    ours = errors(weight, round_on(weight, setting, grid), setting)
    theirs = errors(weight, round_trip(weight, setting), setting)
    assert bool(mx.all(ours <= theirs * (1 + 1e-5)))


@pytest.mark.parametrize(("bits", "gone"), [(2, 0.33), (3, 0.25), (4, 0.19)])
def test_the_fitted_grid_removes_much_of_the_error_at_few_bits(bits: int, gone: float) -> None:
    weight, setting = mx.random.normal((64, 256), key=mx.random.key(2)), Setting("affine", bits, 64)
    ours = errors(weight, round_on(weight, setting, best_grid(weight, setting)), setting).sum()
    assert float(ours / errors(weight, round_trip(weight, setting), setting).sum()) < 1 - gone


def test_weights_on_a_grid_without_zero_are_reproduced() -> None:
    codes = mx.random.randint(0, 8, (16, 128), key=mx.random.key(3)).astype(mx.float32)
    weight, setting = 0.25 * codes - 0.875, Setting("affine", 3, 64)
    assert not mx.allclose(round_trip(weight, setting), weight, atol=1e-2)
    assert mx.allclose(round_on(weight, setting, best_grid(weight, setting)), weight, atol=1e-5)


def test_a_constant_group_is_reproduced() -> None:
    weight, setting = mx.full((2, 64), 0.3), Setting("affine", 2, 64)
    assert mx.array_equal(round_on(weight, setting, best_grid(weight, setting)), weight)
    assert not round_on(mx.zeros((2, 64)), setting, best_grid(mx.zeros((2, 64)), setting)).any()


@pytest.mark.parametrize("mode", ["affine", "symmetric"])
@pytest.mark.parametrize("bits", BITS["affine"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_rounding_matches_packing_bit_for_bit(mode: str, bits: int, dtype: mx.Dtype) -> None:
    weight, setting = awkward().astype(dtype), Setting(mode, bits, 64)
    grid = (best_grid if mode == "affine" else symmetric_grid)(weight, setting)
    moved = weight + 0.05 * mx.random.normal(weight.shape, key=mx.random.key(4)).astype(dtype)
    rounded = round_on(moved, setting, grid)
    assert rounded.dtype == dtype
    assert mx.array_equal(rounded, unpack(pack(moved, setting, grid), setting, dtype))
    assert mx.array_equal(rounded, mx.compile(lambda one, other: round_on(one, setting, other))(moved, grid))


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_gradients_pass_only_weights_within_half_a_step_of_the_grid(scale: float) -> None:
    bias = -3 * scale / 2  # points at -1.5, -0.5, 0.5 and 1.5 steps
    grid = mx.array([scale, bias]).reshape(2, 1, 1)
    weight = mx.zeros((1, 32))
    weight[0, :6] = mx.array([-1.1, -0.99, -0.3, 0.75, 0.99, 1.1])
    kept = where_on(weight, Setting("affine", 2, 32), grid, mx.ones((1, 32)))
    assert kept[0, :6].tolist() == [0, 1, 1, 1, 1, 0]
    assert kept[0, 6:].all()
