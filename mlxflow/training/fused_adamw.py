"""AdamW by one fused kernel per long array, on the optimizer state of `mlx.optimizers`."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlxflow.kernels import adamw


def apply(
    optimizer: optim.Optimizer,
    weights: dict[str, mx.array],
    gradients: Mapping[str, mx.array],
    *,
    scale: mx.array,
    is_finite: mx.array,
    model_type: mx.Dtype | None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Update weights and moments in place; return the learning rate and the arrays for the model.

    Args:
        optimizer: AdamW or Adam, initialized.
        weights: long arrays by name; replaced.
        gradients: of the same names.
        scale: factor on the gradients, a scalar.
        is_finite: whether to apply the update, a boolean scalar.
        model_type: dtype of the returned arrays; None for that of the weights.
    """
    state = optimizer.state
    old_rate, step = state["learning_rate"], state["step"]
    schedule = optimizer._schedulers.get("learning_rate")
    rate = old_rate if schedule is None else schedule(step)
    b1, b2 = optimizer.betas
    first = root = mx.array(1.0)
    if optimizer.bias_correction:
        first, root = 1 / (1 - b1 ** (step + 1)), mx.rsqrt(1 - b2 ** (step + 1))
    scalars = adamw.Scalars(rate.astype(mx.float32), scale.astype(mx.float32), is_finite, first, root)
    settings = adamw.AdamWSettings(b1, b2, optimizer.eps, getattr(optimizer, "weight_decay", 0.0))
    rounded: dict[str, mx.array] = {}
    for name in [name for name in weights if name in state]:
        moments: dict[str, Any] = state[name]
        old = weights[name]
        weights[name], moments["m"], moments["v"], rounded[name] = adamw.kernel(
            old, gradients[name], moments["m"], moments["v"], scalars, settings, model_type or old.dtype
        )
    state["learning_rate"] = mx.where(is_finite, rate, old_rate)
    state["step"] = mx.where(is_finite, step + 1, step)
    return rate, rounded
