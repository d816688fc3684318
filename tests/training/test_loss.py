import math

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.training.loss import cross_entropy, next_token_loss


def _relative(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return float(mx.abs(a - b).max() / mx.abs(b).max())


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradient_are_those_of_mlx(scale: float, compiled: bool) -> None:
    logits = mx.random.normal((3, 5, 97), key=mx.random.key(0)) * scale
    targets = mx.random.randint(0, 97, (3, 5), key=mx.random.key(1))
    weights = mx.random.uniform(shape=(3, 5), key=mx.random.key(2))
    ours = mx.value_and_grad(lambda x: (cross_entropy(x, targets) * weights).sum())
    theirs = mx.value_and_grad(lambda x: (nn.losses.cross_entropy(x, targets) * weights).sum())
    (loss, gradient), (expected_loss, expected_gradient) = (
        (mx.compile(ours) if compiled else ours)(logits),
        theirs(logits),
    )
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    assert _relative(gradient, expected_gradient) < 1e-5


def test_bf16_logits_are_summed_in_fp32_and_get_a_bf16_gradient() -> None:
    logits = mx.random.normal((64, 1000), key=mx.random.key(0)).astype(mx.bfloat16)
    targets = mx.zeros((64,), mx.uint16)
    loss, gradient = mx.value_and_grad(lambda x: cross_entropy(x, targets).mean())(logits)
    exact, exact_gradient = mx.value_and_grad(lambda x: nn.losses.cross_entropy(x, targets, reduction="mean"))(
        logits.astype(mx.float32)
    )
    assert loss.dtype == mx.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)
    assert gradient.dtype == mx.bfloat16
    assert _relative(gradient, exact_gradient) < 2**-8


def test_extreme_logits_stay_finite() -> None:
    logits = mx.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    losses = cross_entropy(logits, mx.array([1, 2]))
    gradient = mx.grad(lambda x: cross_entropy(x, mx.array([1, 2])).sum())(logits)
    assert losses.tolist() == pytest.approx([2e4, 1.0986123])
    assert mx.isfinite(gradient).all()


def test_the_loss_is_of_each_token_after_the_ones_before_it() -> None:
    batch = mx.array([[1, 2, 0], [2, 2, 1]])
    seen = []

    class Model(nn.Module):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            seen.append(ids.tolist())
            return mx.zeros((2, 2, 3))

    loss = next_token_loss(Model(), batch, mx.full((2, 3), 3), masks_documents=False)
    assert seen == [[[1, 2], [2, 2]]]
    assert float(loss) == pytest.approx(1.0986123)


def test_a_token_that_is_no_target_counts_for_nothing() -> None:
    tokens = mx.array([[1, 2, 0, 1]])

    class Model(nn.Module):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            return mx.array([[[0.0, 1.0, 2.0], [5.0, 0.0, 0.0], [9.0, 9.0, 0.0]]])

    loss = next_token_loss(Model(), tokens, mx.array([[2, 3, 2, 5]]), masks_documents=False)
    first, third = math.log(1 + math.e + math.e**2) - 2, math.log(2 + math.exp(-9))
    assert float(loss) == pytest.approx((first + third) / 2, rel=1e-5)
    assert float(next_token_loss(Model(), tokens, mx.array([[2, 2, 2, 4]]), masks_documents=False)) == 0
