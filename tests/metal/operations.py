"""Operations that kernels compute, with inputs of awkward sizes and what comes out in float64."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxflow.kernels import adamw, cross_entropy, embedding, gated_activation, rms_norm, rotary
from tests.metal import float64
from tests.metal.float64 import Numbers

Arrays = Sequence[mx.array]
_EPS = 1e-5
_SETTINGS = adamw.AdamWSettings(b1=0.9, b2=0.95, eps=1e-8, decay=0.1)


class Operation(NamedTuple):
    """One call of the kernels of an operation.

    Attributes:
        inputs: of the kernels.
        kernel: the call.
        exact: the same in float64, of the same inputs.
        additions: the most numbers that are added up for one number of the result.
    """

    inputs: Arrays
    kernel: Callable[..., Arrays]
    exact: Callable[..., list[Numbers]]
    additions: int

    def error(self) -> float:
        """Return the largest error of a result over what its type and the number of additions allow."""
        exact = self.exact(*(_wide(array) for array in self.inputs))
        return max(
            _error(found, wanted, self.additions)
            for found, wanted in zip(self.kernel(*self.inputs), exact, strict=True)
        )


def _wide(array: mx.array) -> Numbers:
    is_float = mx.issubdtype(array.dtype, mx.floating)
    return np.array(array.astype(mx.float32)).astype(np.float64) if is_float else np.array(array)


def _error(found: mx.array, exact: Numbers, additions: int) -> float:
    """Return the largest error, by the largest number of its row, over the allowed one; infinite for NaN."""
    assert found.shape == exact.shape
    rows, wanted = (each.reshape(-1, (*exact.shape, 1)[max(0, exact.ndim - 1)]) for each in (_wide(found), exact))
    largest = np.maximum(np.abs(wanted).max(-1), 1e-30)
    rounding = 2.0**-8 if found.dtype == mx.bfloat16 else 2.0**-24
    allowed = rounding + (16 + additions) * 2.0**-24
    error = float((np.abs(rows - wanted).max(-1) / largest).max())
    return error / allowed if error == error else float("inf")


def random(shape: Sequence[int], seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return normally distributed numbers."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def norm(dtype: mx.Dtype, rows: int, width: int, weight: mx.Dtype | None = None) -> Operation:
    """Return a norm, forward and backward, with a trained and with a frozen weight."""

    def kernel(x: mx.array, w: mx.array, g: mx.array) -> Arrays:
        of_frozen = rms_norm.kernel_frozen_gradient(x, w, _EPS, g)
        return [rms_norm.kernel(x, w, _EPS), *rms_norm.kernel_gradients(x, w, _EPS, g), of_frozen]

    def exact(x: Numbers, w: Numbers, g: Numbers) -> list[Numbers]:
        dx, dw = float64.norm_gradients(x, w, _EPS, g)
        return [float64.norm(x, w, _EPS), dx, dw, dx]

    inputs = [
        random((rows, width), 0, dtype),
        1 + random((width,), 1, weight or dtype),
        random((rows, width), 2, dtype),
    ]
    assert rms_norm.supports(inputs[0])
    return Operation(inputs, kernel, exact, rows + width)


def residual_norm(dtype: mx.Dtype, rows: int, width: int) -> Operation:
    """Return a sum and its norm, forward and backward."""
    x, r, e, g = (random((rows, width), seed, dtype) for seed in range(4))
    w = 1 + random((width,), 5, dtype)
    h = x + r

    def kernel(x: mx.array, r: mx.array, h: mx.array, w: mx.array, e: mx.array, g: mx.array) -> Arrays:
        of_frozen = rms_norm.kernel_sum_frozen_gradient(h, w, _EPS, e, g)
        return [*rms_norm.kernel_sum(x, r, w, _EPS), *rms_norm.kernel_sum_gradients(h, w, _EPS, e, g), of_frozen]

    def exact(_: Any, __: Any, h: Numbers, w: Numbers, e: Numbers, g: Numbers) -> list[Numbers]:
        dh, dw = float64.norm_gradients(h, w, _EPS, g)
        return [h, float64.norm(h, w, _EPS), dh + e, dw, dh + e]

    return Operation([x, r, h, w, e, g], kernel, exact, rows + width)


def gated(dtype: mx.Dtype, rows: int, width: int, activation: str, *, joined: bool = False) -> Operation:
    """Return the gradients of a gated activation, side by side or apart."""

    def kernel(a: mx.array, b: mx.array, g: mx.array) -> Arrays:
        if joined:
            return [*mx.split(gated_activation.kernel_joined(activation, a, b, g), 2, axis=-1)]
        return gated_activation.kernel_gradients(activation, a, b, g)

    def exact(a: Numbers, b: Numbers, g: Numbers) -> list[Numbers]:
        return float64.gated_gradients(activation, a, b, g)

    inputs = [random((rows, width), seed, dtype) * 2 for seed in range(3)]
    assert gated_activation.supports(*inputs[:2])
    assert not joined or gated_activation.supports_joined(*inputs[:2])
    return Operation(inputs, kernel, exact, 16)


def rotated(dtype: mx.Dtype, shape: tuple[int, ...], turned: int, *, interleaved: bool) -> Operation:
    """Return the rotation of heads, (B, H, L, E), and the rotation back."""
    angles = np.arange(shape[2])[:, None] * 10.0 ** (-np.arange(turned // 2) / turned)
    cosines = [mx.array(each.astype(np.float32)) for each in (np.cos(angles), np.sin(angles))]
    batch, heads, length, width = shape
    x = random((batch, length, heads, width), 0, dtype).transpose(0, 2, 1, 3)
    assert rotary.supports(x, turned)

    def call(function: Callable[..., Any]) -> Callable[..., list[Any]]:
        return lambda x, c, s: [function(x, c, s, interleaved, back) for back in (False, True)]

    return Operation([x, *cosines], call(rotary.kernel), call(float64.rotary), 2)


def embedded(dtype: mx.Dtype, numbers: Sequence[int], width: int, count: int) -> Operation:
    """Return the gradient of an embedding lookup."""
    inputs = [mx.array([*numbers]), random((len(numbers), width), 0, dtype)]
    assert embedding.supports(inputs[1], count)
    return Operation(
        inputs,
        lambda numbers, incoming: [embedding.kernel_gradient(numbers, incoming, count)],
        lambda numbers, incoming: [float64.embedding_gradient(numbers, incoming, count)],
        max(map(list(numbers).count, set(numbers))),
    )


def loss(dtype: mx.Dtype, rows: int, width: int, targets: mx.Dtype) -> Operation:
    """Return the gradient of a cross-entropy."""
    logits = random((rows, width), 0, dtype)
    sums = mx.logsumexp(logits.astype(mx.float32), axis=-1)
    numbers = (mx.arange(rows) * 5 + width - 1) % width
    inputs = [logits, sums, numbers.astype(targets), random((rows,), 1)]
    assert cross_entropy.supports(logits)
    return Operation(
        inputs,
        lambda *arrays: [cross_entropy.kernel_gradient(*arrays)],
        lambda *arrays: [float64.cross_entropy_gradient(*arrays)],
        16,
    )


def update(weights: mx.Dtype, gradients: mx.Dtype, size: int, *, keeps: bool = True) -> Operation:
    """Return an update of AdamW with weights rounded to bf16."""
    w, m, v = (random((size,), seed, weights) for seed in range(3))
    scalars = [mx.array(0.01), mx.array(0.5), mx.array(keeps), mx.array(1.5), mx.array(1.2)]
    inputs = [w, random((size,), 3, gradients), m, v.square(), *scalars]
    assert adamw.supports(w, inputs[1])

    def kernel(w: mx.array, g: mx.array, m: mx.array, v: mx.array, *scalars: mx.array) -> Arrays:
        return adamw.kernel(w, g, m, v, adamw.Scalars(*scalars), _SETTINGS, mx.bfloat16)

    def exact(w: Numbers, g: Numbers, m: Numbers, v: Numbers, *scalars: Numbers) -> list[Numbers]:
        rate, scale, keep, first, root = scalars
        if not keep:
            return [w, m, v, w]
        b1, b2, eps, decay = _SETTINGS
        m, v = b1 * m + (1 - b1) * g * scale, b2 * v + (1 - b2) * (g * scale) ** 2
        w = (1 - rate * decay) * w - rate * first * m / (np.sqrt(v) * root + eps)
        return [w, m, v, w]

    return Operation(inputs, kernel, exact, 16)


def squares(dtype: mx.Dtype, size: int) -> Operation:
    """Return the sum of squares."""
    return Operation(
        [random((size,), 0, dtype)],
        lambda x: [adamw.kernel_sum_of_squares(x)],
        lambda x: [np.square(x).sum()],
        size,
    )


def every(dtype: mx.Dtype) -> dict[str, Operation]:
    """Return each operation at each awkward size, by name; some inputs of each have fewer than 8 numbers if they can.

    With the few cores of the stand-in the larger ones take loops over rows and over numbers two rounds and more.
    """
    other = mx.float32 if dtype == mx.bfloat16 else mx.bfloat16
    often = [5] * 40 + [0, 6, 6] + [5] * 31
    found = {
        "norm, one row of 8": norm(dtype, 1, 8),
        "norm, weight of another type": norm(dtype, 9, 40, other),
    }
    # A width for each number of threads that share a row, none a power of two but the last
    for rows, width in ((101, 72), (27, 776), (11, 2056), (5, 3104), (9, 8192)):
        found[f"norm, {rows} rows of {width}"] = norm(dtype, rows, width)
    for rows, width in ((1, 8), (101, 72), (11, 2056)):
        found[f"sum and norm, {rows} rows of {width}"] = residual_norm(dtype, rows, width)
    for activation in gated_activation.ACTIVATIONS:
        found[f"{activation}, 8 numbers"] = gated(dtype, 1, 8, activation)
        found[f"{activation}, rows of 12"] = gated(dtype, 374, 12, activation)
        found[f"{activation} side by side"] = gated(dtype, 29, 88, activation, joined=True)
    for interleaved in (False, True):
        form = " of neighbours" * interleaved
        found[f"rotation{form}, one token"] = rotated(dtype, (1, 1, 1, 16), 16, interleaved=interleaved)
        found[f"rotation{form}, a part"] = rotated(dtype, (2, 3, 7, 80), 32, interleaved=interleaved)
        found[f"rotation{form}"] = rotated(dtype, (2, 5, 53, 48), 48, interleaved=interleaved)
    found |= {
        "embedding, 3 lookups": embedded(dtype, [1, 4, 1], 8, 5),
        "embedding, more rows than a group": embedded(dtype, [1, 299, 1, 299, 299, 0, 7, 7], 40, 300),
        "embedding, frequent tokens": embedded(dtype, often, 72, 9),
        "embedding, two frequent tokens": embedded(dtype, [5, 6] * 150, 136, 9),
        "embedding, wide rows": embedded(dtype, often, 2056, 7),
        "loss, 1 row of 8": loss(dtype, 1, 8, mx.uint8),
        "loss, 7 rows": loss(dtype, 7, 104, mx.uint16),
        "loss, wide rows": loss(dtype, 9, 4104, mx.uint32),
        "loss, long numbers": loss(dtype, 3, 16, mx.int64),
    }
    for weights in (mx.float32, mx.bfloat16):
        for size in (8, 9, 15, 4099):
            found[f"update of {size} {weights}"] = update(weights, dtype, size)
    found["update that is not done"] = update(mx.float32, dtype, 21, keeps=False)
    for size in (1, 7, 8, 9, 100_003):
        found[f"squares of {size}"] = squares(dtype, size)
    return found
