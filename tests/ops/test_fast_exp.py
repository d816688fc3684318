"""Exponentials from bits, against NumPy's in double precision."""

import mlx.core as mx
import numpy as np

from mlxflow.ops.fast_exp import LOG2_E, exp2, exp2_below


def test_exp2_is_accurate_to_the_last_bits() -> None:
    x = np.concatenate([np.linspace(-126, 127.99, 200_001), np.arange(-126, 128)]).astype(np.float32)
    for function in (exp2, mx.compile(exp2)):
        found = np.array(function(mx.array(x))).astype(np.float64)
        np.testing.assert_allclose(found, np.exp2(x.astype(np.float64)), rtol=1.8e-7)


def test_exp2_of_extreme_inputs_is_infinity_or_the_smallest_normal_number() -> None:
    assert exp2(mx.array([-np.inf, -1e30, 128.0, np.inf])).tolist() == [2.0**-126, 2.0**-126, np.inf, np.inf]


def test_exp2_below_matches_the_exact_exponential_of_a_row_less_its_maximum() -> None:
    x = mx.random.normal((64, 300), key=mx.random.key(0)) * 3
    largest = x.max(axis=-1, keepdims=True)
    exact = np.exp(np.array(x).astype(np.float64) - np.array(largest))
    for function in (exp2_below, mx.compile(lambda x, largest, factor: exp2_below(x, largest, LOG2_E))):
        found = np.array(function(x, largest, LOG2_E))
        np.testing.assert_allclose(found, exact, rtol=2e-6)
        assert (found[np.array(x == largest)] == 1).all()


def test_exp2_below_returns_no_denormals() -> None:
    far = exp2_below(mx.array([0.0, -1e4, -np.inf]), mx.array([0.0]), 1.0)
    assert far.tolist() == [1.0, 2.0**-64, 2.0**-64]
