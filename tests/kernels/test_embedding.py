import mlx.core as mx
import pytest

from mlxflow.kernels import embedding
from tests.kernels.stand_ins import uncompiled  # noqa: F401
from tests.kernels.test_verification_cases import TYPES, _close, _random, _tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [8, 72, 2040, 2048, 4104])
def test_embedding_gradients_are_summed_for_any_width(width: int, dtype: mx.Dtype) -> None:
    often = mx.where(mx.arange(700) % 3 == 0, 5, mx.random.randint(0, 40, (700,), key=mx.random.key(0)))
    for numbers in (often, mx.array([0, 40, 40]), mx.zeros((17,), mx.int32), mx.arange(16) // 16):
        incoming = _random((len(numbers), width), 1, dtype)
        found, wanted = (
            function(numbers, incoming, 41) for function in (embedding.kernel_gradient, embedding.reference_gradient)
        )
        _close([found], [wanted], _tolerance(dtype))
        assert mx.array_equal(found, embedding.kernel_gradient(numbers, incoming, 41))
