"""Gated activations, y = act(a) b, backward: SwiGLU and GeGLU (Shazeer 2020, arXiv:2002.05202).

    da = g b act'(a)          db = g act(a)

    silu:        act(a) = a s,  act'(a) = s (1 + a (1 - s)),  s = 1 / (1 + e^-a)
    gelu:        act(a) = a P,  act'(a) = P + a p,  P and p the normal distribution's function and density
    gelu_approx: act(a) = a (1 + t) / 2,  t = tanh(u),  u = sqrt(2 / pi) (a + 0.044715 a^3)
                 act'(a) = (1 + t) / 2 + a (1 - t^2) u' / 2

The forward pass is MLX's own, which `mx.compile` fuses well; the backward pass reads a, b and g once. P is computed
with the approximation 7.1.26 of Abramowitz and Stegun, whose error is under 1.5e-7.

Where a and b are projections of one x, a = x A' and b = x B', a kernel writes da and db side by side, so that one
product gives the gradient of x and another those of both weights, and nothing has to be added:

    dx = (da db) (A B)          (dA dB) = (da db)' x

| takes | |
| --- | --- |
| a, b, g | fp32 or bf16, of one shape, at least 8 numbers, a multiple of 8, less than 2^31 |
| side by side | besides: rows of a multiple of 8, less than 2^30 numbers |
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.kernels.codegen import KernelSource, groups_for
from mlxflow.ops.custom_function import custom_function

#: Every activation by its name.
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu_approx": nn.gelu_approx,
}

_HEADER = """
template <int ACT> INLINE void both(float x, LOCAL float& value, LOCAL float& slope) {
  if (ACT == 0) {
    const float s = 1.0f / (1.0f + EXP(-x));
    value = x * s;
    slope = s * (1.0f + x * (1.0f - s));
  } else if (ACT == 1) {
    const float z = (x < 0 ? -x : x) * 0.70710678f;
    const float t = 1.0f / (1.0f + 0.3275911f * z);
    const float e = EXP(-z * z);
    const float poly = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f
      + t * 1.061405429f))));
    const float half_tail = 0.5f * poly * e;
    const float below = x < 0 ? half_tail : 1.0f - half_tail;
    value = x * below;
    slope = below + x * 0.39894228f * e;
  } else {
    const float square = x * x;
    const float t = TANH(0.79788456f * (x + 0.044715f * square * x));
    value = 0.5f * x * (1.0f + t);
    slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * square);
  }
}
"""

# The two placeholders are replaced by the positions of da and db
_BODY = """
  const int size = a_size;
  const int at = (group * THREADS + worker) * 8;
  if (at < size) {
    float as[8], bs[8], gs[8];
    read_8(a + at, as);
    read_8(b + at, bs);
    read_8(g + at, gs);
    for (int i = 0; i < 8; ++i) {
      float value, slope;
      both<ACT>(as[i], value, slope);
      as[i] = gs[i] * bs[i] * slope;
      bs[i] = gs[i] * value;
    }
    write_8(%s, as);
    write_8(%s, bs);
  }
"""

_SOURCE = KernelSource(
    name="gated_backward",
    inputs=("a", "b", "g"),
    outputs=("da", "db"),
    header=_HEADER,
    body=_BODY % ("da + at", "db + at"),
)

_JOINED = KernelSource(
    name="gated_backward_joined",
    inputs=("a", "b", "g"),
    outputs=("d",),
    header=_HEADER,
    body=_BODY % ("d + at + at / a_width * a_width", "d + at + (at / a_width + 1) * a_width"),
)


def reference(name: str, a: mx.array, b: mx.array) -> mx.array:
    """Return act(a) b as MLX computes it."""
    return ACTIVATIONS[name](a) * b


def reference_gradients(name: str, a: mx.array, b: mx.array, incoming: mx.array) -> tuple[mx.array, mx.array]:
    """Return the gradients of a and b in plain operations, computed in fp32."""
    x, other, given = (array.astype(mx.float32) for array in (a, b, incoming))
    value, slope = _value_and_slope(name, x)
    return (given * other * slope).astype(a.dtype), (given * value).astype(b.dtype)


def _value_and_slope(name: str, x: mx.array) -> tuple[mx.array, mx.array]:
    if name == "silu":
        s = mx.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if name == "gelu":
        below = 0.5 * (1 + mx.erf(x / math.sqrt(2)))
        return x * below, below + x * mx.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    root = math.sqrt(2 / math.pi)
    t = mx.tanh(root * (x + 0.044715 * x * x * x))
    slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * root * (1 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1 + t), slope


def supports(a: mx.array, b: mx.array) -> bool:
    """Return whether the kernel takes arrays of these shapes and types."""
    is_supported = a.dtype == b.dtype and a.shape == b.shape and a.dtype in (mx.float32, mx.bfloat16)
    return is_supported and a.ndim > 0 and a.size % 8 == 0 and 8 <= a.size < 2**31


def kernel_gradients(name: str, a: mx.array, b: mx.array, incoming: mx.array) -> tuple[mx.array, mx.array]:
    """Return what `reference_gradients` does, by the kernel."""
    da, db = _SOURCE.launch(
        [a, b, incoming],
        constants=[("ACT", list(ACTIVATIONS).index(name))],
        groups=groups_for(a.size),
        shapes=[a.shape, b.shape],
        dtypes=[a.dtype, b.dtype],
    )
    return da, db


def supports_joined(a: mx.array, b: mx.array) -> bool:
    """Return whether the kernel that writes both gradients side by side takes arrays of these shapes and types."""
    return supports(a, b) and a.shape[-1] % 8 == 0 and a.size < 2**30


def reference_joined(name: str, a: mx.array, b: mx.array, incoming: mx.array) -> mx.array:
    """Return the gradients of a and b side by side, (..., 2 F) for (..., F), in plain operations."""
    return mx.concatenate([*reference_gradients(name, a, b, incoming)], axis=-1)


def kernel_joined(name: str, a: mx.array, b: mx.array, incoming: mx.array) -> mx.array:
    """Return what `reference_joined` does, by the kernel."""
    (both,) = _JOINED.launch(
        [a, b, incoming],
        constants=[("ACT", list(ACTIVATIONS).index(name))],
        groups=groups_for(a.size),
        shapes=[(*a.shape[:-1], 2 * a.shape[-1])],
        dtypes=[a.dtype],
    )
    return both


@functools.cache
def projected(name: str, kernel_dtype: mx.Dtype) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    """Return a differentiable function of x, (..., D), and two weights, (F, D): act(x A') (x B'), (..., F).

    Args:
        name: of the activation.
        kernel_dtype: of arrays that the kernel is used for; others take plain operations.
    """

    def forward(x: mx.array, gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        a, b = x @ gate.T, x @ up.T
        return reference(name, a, b), a, b  # a and b only for the backward pass

    function = custom_function(forward)

    @function.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        x, gate, up = primals
        _, a, b = outputs
        if a.dtype == kernel_dtype and supports_joined(a, b):
            both = kernel_joined(name, a, b, cotangents[0])
        else:
            both = reference_joined(name, a, b, cotangents[0])
        weights = both.reshape(-1, both.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        return both @ mx.concatenate([gate, up]), weights[: len(gate)], weights[len(gate) :]

    return lambda x, gate, up: cast("tuple[mx.array, ...]", function(x, gate, up))[0]


@functools.cache
def gated(name: str, kernel_dtype: mx.Dtype) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a differentiable function of a and b.

    Args:
        name: of the activation.
        kernel_dtype: of arrays that the kernel is used for; others take plain operations.
    """
    function = custom_function(functools.partial(reference, name))

    @function.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        a, b = primals
        gradients = kernel_gradients if a.dtype == kernel_dtype and supports(a, b) else reference_gradients
        return gradients(name, a, b, cotangent)

    return cast("Callable[[mx.array, mx.array], mx.array]", function)
