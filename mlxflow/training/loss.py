"""Cross-entropy, alone or fused with the output head; the gradient reuses the exponentials of the forward pass.

`nn.losses.cross_entropy` computes the exponential of every logit twice, for the log-sum and for the gradient. On the
CPU backend a small model's step spends most of its time in the exponential; there it is that of `ops.fast_exp`. On a
GPU MLX's fused kernels read the logits once for the losses and once for the gradient, in their own dtype.

`linear_cross_entropy` never holds the logits of all rows: it computes the gradients chunk by chunk in the forward pass,
one chunk after another, as Liger Kernel does (Hsu et al. 2024, arXiv:2410.10989).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from mlxflow.ops import quantized_matmul
from mlxflow.ops.custom_function import custom_function
from mlxflow.ops.fast_exp import LOG2_E, exp2_below
from mlxflow.ops.quantized_matmul import Format


def cross_entropy(logits: mx.array, targets: mx.array, *, uses_kernel: bool = False) -> mx.array:
    """Return `logsumexp(logits) - logits[target]` for every row, in fp32 for any dtype of the logits.

    The gradient is (softmax(logits) - one_hot(targets)) times the incoming gradient, in the dtype of the logits.

    Args:
        logits: (..., V), floating.
        targets: (...), ids from 0 to V - 1.
        uses_kernel: whether our kernel computes the gradient on a GPU, where it supports the logits.
    """
    if mx.default_device() == mx.cpu:
        return cast("tuple[mx.array, mx.array]", _cross_entropy_cpu(logits, targets))[0]
    if uses_kernel:
        return cast("mx.array", _cross_entropy_kernel(logits, targets))
    return cast("mx.array", _cross_entropy_gpu(logits, targets))


@custom_function
def _cross_entropy_cpu(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the losses, (...), and the softmax, (..., V), which only the gradient uses."""
    exponentials, sums, losses = _exponentials(logits.astype(mx.float32), targets)
    return losses, exponentials / sums


@_cross_entropy_cpu.vjp
def _cross_entropy_cpu_vjp(
    primals: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array],
    outputs: tuple[mx.array, mx.array],
) -> tuple[mx.array, mx.array]:
    logits, targets = primals
    incoming = cotangents[0][..., None]
    gradient = outputs[1] * incoming
    index = targets[..., None]
    at_target = mx.take_along_axis(gradient, index, axis=-1) - incoming
    return mx.put_along_axis(gradient, index, at_target, axis=-1).astype(logits.dtype), mx.zeros_like(targets)


def _fast_cross_entropy(gradient_of: Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]) -> Any:
    """Return MLX's fused cross-entropy with a gradient of ours.

    Args:
        gradient_of: maps logits, targets, incoming gradient and losses to the gradient of the logits.
    """

    @custom_function
    def losses_of(logits: mx.array, targets: mx.array) -> mx.array:
        return mx.fast.cross_entropy(logits, targets)

    @losses_of.vjp
    def gradients(
        primals: tuple[mx.array, mx.array], cotangent: mx.array, losses: mx.array
    ) -> tuple[mx.array, mx.array]:
        logits, targets = primals
        return gradient_of(logits, targets, cotangent, losses), mx.zeros_like(targets)

    return losses_of


def _kernel_gradient(logits: mx.array, targets: mx.array, incoming: mx.array, losses: mx.array) -> mx.array:
    """Return the gradient of (..., V) logits whose losses are known, by our kernel where it takes them."""
    rows = [logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), incoming.reshape(-1), losses.reshape(-1)]
    return _kernel_rows_gradient(*rows).reshape(logits.shape)


def _kernel_rows_gradient(logits: mx.array, targets: mx.array, incoming: mx.array, losses: mx.array) -> mx.array:
    """Return what `_logits_gradient` does for (N, V) logits whose losses are known, by our kernel."""
    from mlxflow.kernels import cross_entropy as kernels

    if not kernels.supports(logits):
        return _logits_gradient(logits, targets, incoming)
    at_target = mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
    sums = losses.astype(mx.float32) + at_target.astype(mx.float32)
    return kernels.kernel_gradient(logits, sums, targets, incoming.astype(mx.float32))


def _logits_gradient(logits: mx.array, targets: mx.array, incoming: mx.array) -> mx.array:
    """Return (softmax - one_hot) times the incoming gradient, in the dtype of the logits, by one fused kernel."""
    probabilities = mx.softmax(logits, axis=-1, precise=True)
    at_target = mx.arange(logits.shape[-1], dtype=targets.dtype) == targets[..., None]
    gradient = mx.where(at_target, probabilities - 1, probabilities) * incoming[..., None]
    return gradient.astype(logits.dtype)


_cross_entropy_gpu = _fast_cross_entropy(
    lambda logits, targets, incoming, _losses: _logits_gradient(logits, targets, incoming)
)
_cross_entropy_kernel = _fast_cross_entropy(_kernel_gradient)


# --- output head and loss fused


def linear_cross_entropy(
    hidden: mx.array,
    weight: mx.array | tuple[mx.array, ...],
    targets: mx.array,
    weights: mx.array,
    *,
    chunk_rows: int,
    trains_weight: bool,
    uses_kernel: bool = False,
    form: Format | None = None,
) -> mx.array:
    """Return the weighted sum of the cross-entropies of `hidden @ weight.T`, a scalar in fp32.

    Holds the logits of one chunk at a time. Value and gradients are those of `cross_entropy` after the product; the
    gradient of `weight` is summed over the chunks in fp32. For training: the gradients are always computed with the
    value.

    Args:
        hidden: (N, D), the input of the head.
        weight: (V, D) of the head, in the dtype of `hidden`; a frozen quantized one: codes, scales and maybe biases.
        targets: (N,) ids from 0 to V - 1.
        weights: (N,) of each row in the sum, in fp32; 0 leaves it out.
        chunk_rows: rows whose logits are held at a time.
        trains_weight: whether the gradient of `weight` is needed.
        uses_kernel: see `cross_entropy`.
        form: of a quantized weight, which is dequantized in slices for each chunk; None for a dense one.
    """
    if form is None:
        losses = _kernel_losses_and_gradient if uses_kernel else _losses_and_gradient
        dense = cast("mx.array", weight)
        return linear_losses(
            hidden, dense, (targets, weights), losses, chunk_rows=chunk_rows, trains_weight=trains_weight
        )
    return _frozen_cross_entropy(chunk_rows, form, uses_kernel)(hidden, targets, weights, *weight)[0]


@functools.cache
def _frozen_cross_entropy(chunk_rows: int, form: Format, uses_kernel: bool) -> Callable[..., tuple[mx.array, ...]]:
    """Return the same for a frozen quantized weight; no dense copy of it is held."""

    @custom_function
    def function(hidden: mx.array, targets: mx.array, weights: mx.array, *weight: mx.array) -> tuple[mx.array, ...]:
        total = mx.array(0.0)
        parts: list[mx.array] = []
        for begin in range(0, len(hidden), chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            part = mx.depends(hidden[rows], [total, parts[-1]]) if parts else hidden[rows]
            logits = quantized_matmul.multiply(part, weight, form, transpose=True)
            losses, gradient = _losses_and_gradient(logits, targets[rows], weights[rows], uses_kernel)
            total = total + losses
            parts.append(quantized_matmul.multiply(gradient, weight, form, transpose=False))
        return total, mx.concatenate(parts)

    @function.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        return (outputs[1] * cotangents[0]).astype(outputs[1].dtype), *map(mx.zeros_like, primals[1:])

    return cast("Callable[..., tuple[mx.array, ...]]", function)


#: Maps logits, (n, V), and a chunk of each further array to the sum of the losses, in fp32, and its gradient with
#: respect to the logits, in their dtype.
LossesAndGradient = Callable[..., tuple[mx.array, mx.array]]


def linear_losses(
    hidden: mx.array,
    weight: mx.array,
    arrays: Sequence[mx.array],
    losses_and_gradient: LossesAndGradient,
    *,
    chunk_rows: int,
    trains_weight: bool,
) -> mx.array:
    """Return the sum of any losses of `hidden @ weight.T`, a scalar in fp32; see `linear_cross_entropy`.

    Args:
        hidden: (N, D), the input of the head.
        weight: (V, D) of the head, in the dtype of `hidden`.
        arrays: what the losses take of each row, (N, ...) each; they get no gradient.
        losses_and_gradient: the same function for the same losses: what it compiles to is kept.
        chunk_rows: rows whose logits are held at a time.
        trains_weight: whether the gradient of `weight` is needed.
    """
    function = _linear_losses(chunk_rows, trains_weight, losses_and_gradient)
    return function(hidden, weight, *arrays)[0]


@functools.cache
def _linear_losses(
    chunk_rows: int, trains_weight: bool, losses_and_gradient: LossesAndGradient
) -> Callable[..., tuple[mx.array, ...]]:
    def forward(hidden: mx.array, weight: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        total = mx.array(0.0)
        parts: list[mx.array] = []
        weight_gradients = [mx.zeros(weight.shape, mx.float32)] if trains_weight else []
        for begin in range(0, len(hidden), chunk_rows):
            rows = slice(begin, begin + chunk_rows)
            part = hidden[rows]
            if parts:  # without an order all chunks would be computed, and held, at the same time
                part = mx.depends(part, [total, parts[-1], *weight_gradients])
            losses, gradient = losses_and_gradient(part @ weight.T, *(array[rows] for array in arrays))
            total = total + losses
            parts.append(gradient @ weight)
            weight_gradients = [sums + (gradient.T @ part).astype(mx.float32) for sums in weight_gradients]
        return total, mx.concatenate(parts), *(sums.astype(weight.dtype) for sums in weight_gradients)

    function = custom_function(forward)

    @function.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        _, weight, *arrays = primals
        incoming = cotangents[0]
        hidden_gradient = (outputs[1] * incoming).astype(outputs[1].dtype)
        weight_gradient = (outputs[2] * incoming).astype(weight.dtype) if trains_weight else mx.zeros_like(weight)
        return hidden_gradient, weight_gradient, *map(mx.zeros_like, arrays)

    return cast("Callable[..., tuple[mx.array, ...]]", function)


def _kernel_losses_and_gradient(logits: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    return _losses_and_gradient(logits, targets, weights, uses_kernel=True)


def _losses_and_gradient(
    logits: mx.array, targets: mx.array, weights: mx.array, uses_kernel: bool = False
) -> tuple[mx.array, mx.array]:
    """Return the weighted sum of the losses, in fp32, and its gradient with respect to the logits, in their type."""
    if mx.default_device() != mx.cpu:
        losses = mx.fast.cross_entropy(logits, targets)
        if uses_kernel:
            return (losses * weights).sum(), _kernel_gradient(logits, targets, weights, losses)
        return (losses * weights).sum(), _logits_gradient(logits, targets, weights)
    index = targets[:, None]
    exponentials, sums, losses = _exponentials(logits.astype(mx.float32), targets)
    gradient = exponentials * (weights[:, None] / sums)
    at_target = mx.take_along_axis(gradient, index, axis=-1) - weights[:, None]
    return (losses * weights).sum(), mx.put_along_axis(gradient, index, at_target, axis=-1).astype(logits.dtype)


def _exponentials(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return e^(logit - largest), (..., V), their sums over a row, (..., 1), and the rows' losses, (...)."""
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = exp2_below(logits, largest, LOG2_E)
    sums = exponentials.sum(axis=-1, keepdims=True)
    at_target = mx.take_along_axis(logits, targets[..., None], axis=-1)
    return exponentials, sums, (mx.log(sums) + (largest - at_target)).squeeze(-1)
