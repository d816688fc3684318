import itertools

import mlx.core as mx
import pytest

from mlxflow.quantization.clipping import best_limits, clip
from mlxflow.quantization.codec import round_trip
from mlxflow.quantization.settings import Setting
from tests.quantization.matrices import awkward, errors

SETTINGS = [Setting("mxfp4", 4, 32), Setting("nvfp4", 4, 16), Setting("mxfp8", 8, 32)]


def _errors(weight: mx.array, limits: mx.array, setting: Setting) -> mx.array:
    return errors(weight, round_trip(clip(weight, limits), setting), setting)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_clipping_increases_the_error_of_no_group(setting: Setting, dtype: mx.Dtype) -> None:
    weight = awkward().astype(dtype)
    limits = best_limits(weight, setting)
    assert limits.dtype == dtype
    unclipped = errors(weight, round_trip(weight, setting), setting)
    assert bool(mx.all(_errors(weight, limits, setting) <= unclipped))
    assert bool(mx.all(mx.abs(clip(weight, limits)) <= mx.abs(weight)))


def test_few_other_pairs_of_limits_have_a_smaller_error() -> None:
    weight, setting = mx.random.normal((16, 64), key=mx.random.key(3)), Setting("mxfp4", 4, 32)
    groups = weight.reshape(16, 2, 32)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    unclipped = least = errors(weight, round_trip(weight, setting), setting)
    shares = [0.65 + place * 0.35 / 12 for place in range(13)]
    for one, other in itertools.product(shares, shares):
        least = mx.minimum(least, _errors(weight, mx.stack([low * one, high * other]), setting))
    found = _errors(weight, best_limits(weight, setting), setting)
    assert float(found.sum() / unclipped.sum()) < 0.97
    assert float(found.sum() / least.sum()) < 1.03
