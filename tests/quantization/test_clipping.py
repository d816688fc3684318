import itertools

import mlx.core as mx
import pytest

from mlxflow.quantization.clipping import best_limits, clip
from mlxflow.quantization.codec import round_trip
from mlxflow.quantization.settings import Setting

SETTINGS = [
    *(Setting("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)),
    Setting("affine", 3, 32),
    Setting("mxfp4", 4, 32),
    Setting("nvfp4", 4, 16),
    Setting("mxfp8", 8, 32),
]


def _weight() -> mx.array:
    """Return groups with and without far weights, on one side of zero, and all zero."""
    weight = mx.random.normal((16, 256), key=mx.random.key(0))
    weight[3] = mx.random.laplace((256,), key=mx.random.key(1))
    weight[4] = mx.abs(weight[4]) + 1
    weight[5, ::50] = 9.0
    weight[6] = 0
    return weight


def _errors(weight: mx.array, kept: mx.array, setting: Setting) -> mx.array:
    lost = (round_trip(kept, setting) - weight).astype(mx.float32)
    return lost.square().reshape(-1, setting.group_size).sum(axis=-1)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_no_group_loses_more_for_having_been_clipped(setting: Setting, dtype: mx.Dtype) -> None:
    weight = _weight().astype(dtype)
    limits = best_limits(weight, setting)
    assert limits.dtype == dtype
    kept = clip(weight, limits)
    assert bool(mx.all(_errors(weight, kept, setting) <= _errors(weight, weight, setting)))
    assert bool(mx.all(mx.abs(kept) <= mx.abs(weight)))


@pytest.mark.parametrize(("bits", "gone"), [(2, 0.15), (3, 0.1), (4, 0.04)])
def test_of_few_bits_much_of_the_error_is_gone(bits: int, gone: float) -> None:
    weight, setting = mx.random.normal((64, 256), key=mx.random.key(2)), Setting("affine", bits, 64)
    clipped = _errors(weight, clip(weight, best_limits(weight, setting)), setting).sum()
    assert float(clipped / _errors(weight, weight, setting).sum()) < 1 - gone


def test_hardly_any_pair_of_limits_loses_less() -> None:
    weight, setting = mx.random.normal((16, 64), key=mx.random.key(3)), Setting("affine", 3, 64)
    found = _errors(weight, clip(weight, best_limits(weight, setting)), setting)
    low, high = weight.min(axis=-1, keepdims=True), weight.max(axis=-1, keepdims=True)
    least = _errors(weight, weight, setting)
    shares = [0.5 + place / 24 for place in range(13)]
    for one, other in itertools.product(shares, shares):
        least = mx.minimum(least, _errors(weight, mx.clip(weight, low * one, high * other), setting))
    assert float(found.sum() / least.sum()) < 1.03
