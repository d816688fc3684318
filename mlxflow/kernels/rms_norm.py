"""The root-mean-square norm, forward and backward.

For a row x of D numbers with weight w (Zhang and Sennrich 2019, arXiv:1910.07467), and r = 1 / sqrt(mean(x^2) + eps):

    y = x r w          dx = g w r - x r^3 / D sum(g w x)          dw = sum over the rows of g x r

A row is held in the registers of 32 to 256 threads, so x and g are read once. The rows are distributed over a fixed
number of groups of threads; each keeps a partial sum of dw, and these are added in a fixed order without atomics, so
two runs are equal to the bit.

In a transformer block the input of the norm is also the residual: h = x + r, y = norm(h), and later h + ... So the sum
and its norm are one kernel, and the incoming gradient of the residual, e, is added where dx is written.

Beside adapters the weight is frozen: the backward pass has a variant without the sums of dw.

| takes | |
| --- | --- |
| x, r, e, g | fp32 or bf16, (..., D), D a multiple of 8 up to 8192, less than 2^31 numbers |
| w | fp32 or bf16, (D,) |
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlxflow.device.gpu_cores import gpu_cores
from mlxflow.kernels.codegen import THREADS, KernelSource
from mlxflow.kernels.rms_norm_source import (
    ADD_SHARES,
    BACKWARD,
    FORWARD,
    FROZEN_BACKWARD,
    SUM_BACKWARD,
    SUM_FORWARD,
    SUM_FROZEN_BACKWARD,
)
from mlxflow.ops.custom_function import custom_function

#: Groups on a core at once; a backward pass has no others. Left to itself the compiler gives a thread of the sum's
#: kernels so many registers that one group has a core alone, and nothing is read while it waits.
_RESIDENT = 2


def reference(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return the norm of rows in plain operations, computed in fp32, in the type of x."""
    wide = x.astype(mx.float32)
    normal = wide * mx.rsqrt(wide.square().mean(-1, keepdims=True) + eps)
    return (normal * weight.astype(mx.float32)).astype(x.dtype)


def reference_gradients(x: mx.array, weight: mx.array, eps: float, incoming: mx.array) -> tuple[mx.array, mx.array]:
    """Return the gradients of x and of the weight in plain operations, computed in fp32."""
    wide, weights, given = (array.astype(mx.float32) for array in (x, weight, incoming))
    r = mx.rsqrt(wide.square().mean(-1, keepdims=True) + eps)
    weighted = given * weights
    along = (weighted * wide).mean(-1, keepdims=True)
    d_weight = (given * wide * r).reshape(-1, x.shape[-1]).sum(0)
    return (weighted * r - wide * along * r * r * r).astype(x.dtype), d_weight.astype(weight.dtype)


def reference_sum(x: mx.array, r: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Return x + r and its norm."""
    h = x + r
    return h, reference(h, weight, eps)


def reference_sum_gradients(
    h: mx.array, weight: mx.array, eps: float, past: mx.array, incoming: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the gradients of h, which is both the residual and the input of its norm, and of the weight."""
    dx, d_weight = reference_gradients(h.astype(mx.float32), weight, eps, incoming)
    return (dx + past.astype(mx.float32)).astype(h.dtype), d_weight


def supports(x: mx.array) -> bool:
    """Return whether the kernels take rows of this shape and type."""
    width = x.shape[-1]
    is_supported = x.dtype in (mx.float32, mx.bfloat16) and x.ndim > 1 and width % 8 == 0 and width <= 8192
    return is_supported and 0 < x.size < 2**31


def kernel(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return what `reference` does, by the kernel."""
    constants, slots = _split(x.shape[-1])
    rows = x.size // x.shape[-1]
    inputs = [x, weight, mx.array([eps] * 8)]
    groups = -(-rows // slots)
    (y,) = FORWARD.launch(
        inputs, constants=constants, groups=groups, shapes=[x.shape], dtypes=[x.dtype], resident=_RESIDENT
    )
    return y


def kernel_gradients(x: mx.array, weight: mx.array, eps: float, incoming: mx.array) -> tuple[mx.array, mx.array]:
    """Return what `reference_gradients` does, by the kernel."""
    return _launch_backward(BACKWARD, [x, weight, incoming, mx.array([eps] * 8)])


def kernel_frozen_gradient(x: mx.array, weight: mx.array, eps: float, incoming: mx.array) -> mx.array:
    """Return the gradient of x alone, as `reference_gradients` does, by the kernel."""
    return _launch_frozen(FROZEN_BACKWARD, [x, weight, incoming, mx.array([eps] * 8)])


def kernel_sum(x: mx.array, r: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Return what `reference_sum` does, by the kernel."""
    constants, slots = _split(x.shape[-1])
    h, y = SUM_FORWARD.launch(
        [x, r, weight, mx.array([eps] * 8)],
        constants=[*constants, ("T", x.dtype)],
        groups=-(-(x.size // x.shape[-1]) // slots),
        shapes=[x.shape] * 2,
        dtypes=[x.dtype] * 2,
        resident=_RESIDENT,
    )
    return h, y


def kernel_sum_gradients(
    h: mx.array, weight: mx.array, eps: float, past: mx.array, incoming: mx.array
) -> tuple[mx.array, mx.array]:
    """Return what `reference_sum_gradients` does, by the kernel."""
    return _launch_backward(SUM_BACKWARD, [h, weight, past, incoming, mx.array([eps] * 8)])


def kernel_sum_frozen_gradient(
    h: mx.array, weight: mx.array, eps: float, past: mx.array, incoming: mx.array
) -> mx.array:
    """Return the gradient of h alone, as `reference_sum_gradients` does, by the kernel."""
    return _launch_frozen(SUM_FROZEN_BACKWARD, [h, weight, past, incoming, mx.array([eps] * 8)])


def rows_at_once(width: int) -> int:
    """Return the rows of a width that all groups of a backward pass read in a round."""
    return _max_groups() * _split(width)[1]


def _max_groups() -> int:
    return _RESIDENT * gpu_cores()


def _launch_frozen(source: KernelSource, inputs: list[mx.array]) -> mx.array:
    x = inputs[0]
    constants, groups = _backward_groups(x)
    (dx,) = source.launch(
        inputs, constants=constants, groups=groups, shapes=[x.shape], dtypes=[x.dtype], resident=_RESIDENT
    )
    return dx


def _backward_groups(x: mx.array) -> tuple[list[tuple[str, Any]], int]:
    """Return the constants of a backward pass over rows, and its groups."""
    constants, slots = _split(x.shape[-1])
    return constants, min(_max_groups(), -(-(x.size // x.shape[-1]) // slots))


def _launch_backward(source: KernelSource, inputs: list[mx.array]) -> tuple[mx.array, mx.array]:
    x, weight = inputs[:2]
    constants, groups = _backward_groups(x)
    dx, shares = source.launch(
        inputs,
        constants=constants,
        groups=groups,
        shapes=[x.shape, (groups, x.shape[-1])],
        dtypes=[x.dtype, mx.float32],
        resident=_RESIDENT,
    )
    (dw,) = ADD_SHARES.launch(
        [shares],
        constants=[("W", weight.dtype)],
        groups=-(-x.shape[-1] // 32),
        shapes=[weight.shape],
        dtypes=[weight.dtype],
    )
    return dx, dw


def _split(width: int) -> tuple[list[tuple[str, Any]], int]:
    """Return the constants of a row's split among threads, and how many rows a group takes at a time."""
    warps = next((count for count in (1, 2, 4) if width <= 768 * count), 8)
    return [("D", width), ("WARPS", warps)], THREADS // (32 * warps)


@functools.cache
def rms_norm(
    eps: float, kernel_dtype: mx.Dtype, *, is_frozen: bool = False
) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a differentiable function of rows, (..., D), and weight, (D,).

    Args:
        eps: added to the mean of the squares.
        kernel_dtype: of arrays that the kernel is used for; others take plain operations.
        is_frozen: whether the weight is not trained: the kernel computes no gradient of it.
    """

    def forward(x: mx.array, weight: mx.array) -> mx.array:
        if _uses_kernel(x, weight, kernel_dtype):
            return kernel(x, weight, eps)
        return mx.fast.rms_norm(x, weight, eps)

    function = custom_function(forward)

    @function.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        x, weight = primals
        if not _uses_kernel(x, weight, kernel_dtype):
            return reference_gradients(x, weight, eps, cotangent)
        if is_frozen:
            return kernel_frozen_gradient(x, weight, eps, cotangent), mx.zeros_like(weight)
        return kernel_gradients(x, weight, eps, cotangent)

    return cast("Callable[[mx.array, mx.array], mx.array]", function)


@functools.cache
def sum_and_norm(
    eps: float, kernel_dtype: mx.Dtype, *, is_frozen: bool = False
) -> Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Return a differentiable function of x and r, (..., D), and weight, (D,), that returns x + r and its norm.

    Args:
        eps: added to the mean of the squares.
        kernel_dtype: of arrays that the kernel is used for; others take plain operations.
        is_frozen: see `rms_norm`.
    """

    def forward(x: mx.array, r: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        if _uses_kernel(x, weight, kernel_dtype) and r.dtype == x.dtype:
            return kernel_sum(x, r, weight, eps)
        h = x + r
        return h, mx.fast.rms_norm(h, weight, eps)

    function = custom_function(forward)

    @function.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        h, weight = outputs[0], primals[2]
        dh, d_weight = _residual_gradients(h, weight, eps, kernel_dtype, cotangents, is_frozen=is_frozen)
        return dh, dh, d_weight

    return cast("Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]", function)


@functools.cache
def residual_and_norm(
    eps: float, kernel_dtype: mx.Dtype, *, is_frozen: bool = False
) -> Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Return a differentiable function of x, (..., D), and weight, (D,), that returns x, as the residual, and its norm.

    Args:
        eps: added to the mean of the squares.
        kernel_dtype: of arrays that the kernel is used for; others take plain operations.
        is_frozen: see `rms_norm`.
    """

    def forward(x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        uses_kernel = _uses_kernel(x, weight, kernel_dtype)
        return x, kernel(x, weight, eps) if uses_kernel else mx.fast.rms_norm(x, weight, eps)

    function = custom_function(forward)

    @function.vjp
    def backward(primals: Any, cotangents: Any, _: Any) -> Any:
        x, weight = primals
        return _residual_gradients(x, weight, eps, kernel_dtype, cotangents, is_frozen=is_frozen)

    return cast("Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]", function)


def _residual_gradients(
    h: mx.array, weight: mx.array, eps: float, kernel_dtype: mx.Dtype, cotangents: Any, *, is_frozen: bool
) -> tuple[mx.array, mx.array]:
    if not _uses_kernel(h, weight, kernel_dtype):
        return reference_sum_gradients(h, weight, eps, *cotangents)
    if is_frozen:
        return kernel_sum_frozen_gradient(h, weight, eps, *cotangents), mx.zeros_like(weight)
    return kernel_sum_gradients(h, weight, eps, *cotangents)


def _uses_kernel(x: mx.array, weight: mx.array, kernel_dtype: mx.Dtype) -> bool:
    return x.dtype == kernel_dtype and supports(x) and weight.dtype in (mx.float32, mx.bfloat16)
