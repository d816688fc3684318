"""Cross-entropy whose gradient reuses the forward pass's exponentials.

`nn.losses.cross_entropy` computes the exponential of every logit twice, once for the log-sum and once more for the
gradient. On the CPU backend the exponential is what a small model's step spends most of its time in, and `mx.power`
is about three times as fast there as `mx.exp` (`benchmarks/cpu.py`), so the CPU computes e^x as 2^(x log2 e).
"""

import math
from typing import cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.packed import apply

_LOG2_E = math.log2(math.e)


def next_token_loss(model: nn.Module, tokens: mx.array, marks: mx.array, *, masks_documents: bool) -> mx.array:
    """Return the mean cross-entropy in nats of the tokens of a batch that are trained on, summed in fp32.

    Args:
        model: maps (B, L) token ids to (B, L, V) logits.
        tokens: (B, L + 1) ids.
        marks: (B, L + 1); see `data.token_file.Batch`.
        masks_documents: no token attends to another document in its row.
    """
    weights = (marks[:, 1:] & 1).astype(mx.float32)
    logits = apply(model, tokens[:, :-1], marks[:, :-1] if masks_documents else None)
    return (cross_entropy(logits, tokens[:, 1:]) * weights).sum() / mx.maximum(weights.sum(), 1.0)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Return `logsumexp(logits) - logits[target]` for every row, in fp32 whatever the type of the logits.

    The gradient is softmax(logits) less one at the target, times the incoming one, in the type of the logits.

    Args:
        logits: (..., V)
        targets: (...) ids from 0 to V - 1.
    """
    return cast("tuple[mx.array, mx.array]", _cross_entropy(logits, targets))[0]


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the losses and the softmax, which only the gradient looks at."""
    shifted = logits.astype(mx.float32)
    shifted = shifted - mx.stop_gradient(shifted.max(axis=-1, keepdims=True))
    exponentials = _exp(shifted)
    sums = exponentials.sum(axis=-1, keepdims=True)
    at_target = mx.take_along_axis(shifted, targets[..., None], axis=-1)
    return (mx.log(sums) - at_target).squeeze(-1), exponentials / sums


@_cross_entropy.vjp
def _cross_entropy_vjp(
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


def _exp(x: mx.array) -> mx.array:
    return mx.power(2.0, x * _LOG2_E) if mx.default_device() == mx.cpu else mx.exp(x)
