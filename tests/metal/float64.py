"""What each kernel computes, in numpy's float64."""

import math

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


def norm(x: Numbers, w: Numbers, eps: float) -> Numbers:
    """Return the root-mean-square norm of rows."""
    result: Numbers = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w
    return result


def norm_gradients(x: Numbers, w: Numbers, eps: float, g: Numbers) -> list[Numbers]:
    """Return the gradients of rows and weight."""
    r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    dx = g * w * r - x * r**3 * (g * w * x).mean(-1, keepdims=True)
    return [dx, (g * x * r).reshape(-1, x.shape[-1]).sum(0)]


def gated_gradients(name: str, a: Numbers, b: Numbers, g: Numbers) -> list[Numbers]:
    """Return the gradients of both factors of a gated activation, of which one goes through the activation."""
    if name == "silu":
        s = 1 / (1 + np.exp(-a))
        value, slope = a * s, s * (1 + a * (1 - s))
    elif name == "gelu":
        below = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))(a)
        value, slope = a * below, below + a * np.exp(-0.5 * a**2) / math.sqrt(2 * math.pi)
    else:
        root = math.sqrt(2 / math.pi)
        t = np.tanh(root * (a + 0.044715 * a**3))
        value = 0.5 * a * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * a * (1 - t**2) * root * (1 + 3 * 0.044715 * a**2)
    return [g * b * slope, g * value]


def rotary(x: Numbers, c: Numbers, s: Numbers, interleaved: bool, back: bool) -> Numbers:
    """Return heads, (B, H, L, E), with their first dimensions rotated."""
    half = c.shape[-1]
    s = -s if back else s
    result = x.copy()
    pairs = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    places = pairs if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b = x[..., places[0]], x[..., places[1]]
    result[..., places[0]], result[..., places[1]] = a * c - b * s, b * c + a * s
    return result


def embedding_gradient(numbers: Numbers, incoming: Numbers, count: int) -> Numbers:
    """Return the sum of the incoming gradients of each row of a table."""
    result = np.zeros((count, incoming.shape[1]))
    np.add.at(result, numbers.astype(int), incoming)
    return result


def cross_entropy_gradient(logits: Numbers, sums: Numbers, targets: Numbers, weights: Numbers) -> Numbers:
    """Return the gradient of logits, (N, V)."""
    result: Numbers = np.exp(logits - sums[:, None])
    result[np.arange(len(targets)), targets.astype(int)] -= 1
    result *= weights[:, None]
    return result
