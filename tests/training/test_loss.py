import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.ops.quantized_matmul import Format
from mlxflow.training.loss import cross_entropy, linear_cross_entropy


def _relative(a: mx.array, b: mx.array) -> float:
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return float(mx.abs(a - b).max() / mx.abs(b).max())


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_cross_entropy_and_gradient_match_mlx(scale: float, compiled: bool) -> None:
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


# --- the head's product and the loss in one


def _problem(rows: int, width: int, vocab_size: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    keys = [mx.random.key(number) for number in range(4)]
    hidden = mx.random.normal((rows, width), key=keys[0])
    weight = mx.random.normal((vocab_size, width), key=keys[1]) * 0.3
    targets = mx.random.randint(0, vocab_size, (rows,), key=keys[2])
    weights = (mx.random.uniform(shape=(rows,), key=keys[3]) > 0.3).astype(mx.float32)
    return hidden, weight, targets, weights


@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 64])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_fused_loss_and_gradients_match_the_plain_loss(chunk_rows: int, compiled: bool) -> None:
    hidden, weight, targets, weights = _problem(50, 16, 97)

    def fused(hidden: mx.array, weight: mx.array) -> mx.array:
        loss = linear_cross_entropy(hidden, weight, targets, weights, chunk_rows=chunk_rows, trains_weight=True)
        return loss * 0.5

    def plain(hidden: mx.array, weight: mx.array) -> mx.array:
        total: mx.array = (nn.losses.cross_entropy(hidden @ weight.T, targets) * weights).sum()
        return total * 0.5

    ours = mx.value_and_grad(fused, argnums=(0, 1))
    loss, gradients = (mx.compile(ours) if compiled else ours)(hidden, weight)
    expected, expected_gradients = mx.value_and_grad(plain, argnums=(0, 1))(hidden, weight)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert _relative(gradient, wanted) < 1e-5


def test_the_fused_loss_in_bf16_is_within_bf16_rounding() -> None:
    hidden, weight, targets, weights = _problem(200, 32, 500)
    half = [part.astype(mx.bfloat16) for part in (hidden, weight)]

    def fused(hidden: mx.array, weight: mx.array) -> mx.array:
        return linear_cross_entropy(hidden, weight, targets, weights, chunk_rows=64, trains_weight=True)

    def exact(hidden: mx.array, weight: mx.array) -> mx.array:
        total: mx.array = (nn.losses.cross_entropy(hidden @ weight.T, targets) * weights).sum()
        return total

    loss, gradients = mx.value_and_grad(fused, argnums=(0, 1))(*half)
    expected, wanted = mx.value_and_grad(exact, argnums=(0, 1))(*(part.astype(mx.float32) for part in half))
    assert loss.dtype == mx.float32
    assert float(loss) == pytest.approx(float(expected), rel=2**-8)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient.dtype == mx.bfloat16
        difference = mx.linalg.norm(gradient.astype(mx.float32) - other) / mx.linalg.norm(other)
        assert float(difference) < 2**-6


def test_the_fused_loss_holds_the_logits_of_one_chunk_only() -> None:
    hidden, weight, targets, weights = _problem(24_576, 16, 1024)
    mx.eval(hidden, weight, targets, weights)

    def peak(chunk_rows: int) -> int:
        function = mx.value_and_grad(
            lambda h: linear_cross_entropy(h, weight, targets, weights, chunk_rows=chunk_rows, trains_weight=False)
        )
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(function(hidden))
        return int(mx.get_peak_memory() - before)

    logits_bytes = 24_576 * 1024 * 4
    assert peak(24_576) > logits_bytes
    assert peak(128) < logits_bytes / 2  # the host runs some chunks ahead


def test_a_head_that_is_not_trained_gets_no_gradient() -> None:
    hidden, weight, targets, weights = _problem(20, 8, 30)

    def fused(weight: mx.array) -> mx.array:
        return linear_cross_entropy(hidden, weight, targets, weights, chunk_rows=8, trains_weight=False)

    assert not mx.any(mx.grad(fused)(weight))


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_the_fused_loss_of_a_packed_weight_is_that_of_its_dense_copy(mode: str) -> None:
    size, bits = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    hidden = mx.random.normal((50, 64), key=mx.random.key(0))
    packed = tuple(mx.quantize(mx.random.normal((96, 64), key=mx.random.key(1)) * 0.3, size, bits, mode))
    biases = packed[2] if len(packed) > 2 else None
    weight = mx.dequantize(packed[0], packed[1], biases, size, bits, mode).astype(mx.float32)
    targets, weights = mx.arange(50) % 96, (mx.arange(50) % 3 != 0).astype(mx.float32)

    def fused(hidden: mx.array) -> mx.array:
        form = Format(size, bits, mode)
        total = linear_cross_entropy(hidden, packed, targets, weights, chunk_rows=16, trains_weight=False, form=form)
        return 0.5 * total

    def plain(hidden: mx.array) -> mx.array:
        return 0.5 * (cross_entropy(hidden @ weight.T, targets) * weights).sum()

    (found, gradient), (expected, wanted) = (mx.value_and_grad(loss)(hidden) for loss in (fused, plain))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(mx.abs(gradient - wanted).max()) <= 200 * 2.0**-24 * float(mx.abs(wanted).max())
