import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.kernels import cross_entropy
from tests.kernels.stand_ins import uncompiled  # noqa: F401
from tests.kernels.test_verification_cases import _random


@pytest.mark.usefixtures("uncompiled")
def test_cross_entropy_gradient_matches_mlx() -> None:
    logits, targets = _random((9, 13), 0) * 20, mx.array([0, 12, 5, 3, 3, 1, 7, 8, 11])
    weights = mx.array([1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 0.25, 1.0, 3.0])

    def loss(z: mx.array) -> mx.array:
        total: mx.array = (nn.losses.cross_entropy(z, targets) * weights).sum()
        return total

    found = cross_entropy.reference_gradient(logits, mx.logsumexp(logits, axis=-1), targets, weights)
    assert mx.allclose(found, mx.grad(loss)(logits), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "is_taken"), [((3, 8), True), ((0, 8), False), ((3, 12), False), ((8,), False), ((1, 3, 8), False)]
)
def test_unsupported_logits_use_the_reference(shape: tuple[int, ...], is_taken: bool) -> None:
    assert cross_entropy.supports(mx.zeros(shape)) == is_taken
    assert cross_entropy.supports(mx.zeros(shape, mx.bfloat16)) == is_taken
    assert not cross_entropy.supports(mx.zeros(shape, mx.float16))
