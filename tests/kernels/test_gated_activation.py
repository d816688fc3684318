import mlx.core as mx
import pytest

from mlxflow.kernels import gated_activation
from tests.kernels.stand_ins import uncompiled  # noqa: F401
from tests.kernels.test_verification_cases import PLAIN, TYPES, _close, _random, _scaled, _tolerance


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", gated_activation.ACTIVATIONS)
def test_gated_activation_gradients_match_mlx(activation: str, dtype: mx.Dtype) -> None:
    a, b, g = (_scaled((8, 7), seed, dtype) for seed in range(3))
    found = mx.vjp(gated_activation.gated(activation, PLAIN), [a, b], [g])
    wanted = mx.vjp(lambda a, b: gated_activation.ACTIVATIONS[activation](a) * b, [a, b], [g])
    for ours, theirs in zip(found, wanted, strict=True):
        _close(ours, theirs, _tolerance(dtype) if dtype == mx.float32 else 2**-5)  # MLX rounds in between


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("activation", gated_activation.ACTIVATIONS)
def test_gradients_of_concatenated_projections_match_mlx(activation: str) -> None:
    x, g = _random((2, 3, 16), 0), _random((2, 3, 24), 1)
    weights = [_random((24, 16), seed) for seed in (2, 3)]
    found = mx.vjp(gated_activation.projected(activation, PLAIN), [x, *weights], [g])
    wanted = mx.vjp(lambda x, a, b: gated_activation.ACTIVATIONS[activation](x @ a.T) * (x @ b.T), [x, *weights], [g])
    for ours, theirs in zip(found, wanted, strict=True):
        _close(ours, theirs, _tolerance(mx.float32))
