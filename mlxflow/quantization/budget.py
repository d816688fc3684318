"""Choose bits for each layer within a budget of bytes: the exact minimum of the estimated cost."""

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxflow.messages.byte_sizes import show_apart
from mlxflow.messages.errors import WorkflowError
from mlxflow.quantization.codec import packed_bytes, round_trip
from mlxflow.quantization.sensitivity import Costs
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.streamed_gradients import Objective

#: Bytes of each layer at each of its candidate settings.
Sizes = dict[str, dict[Setting, int]]

# The most distinct totals; if the sizes have more they are rounded up, so that the budget is kept
_MOST_TOTALS = 1 << 16


def sizes_of(model: nn.Module, candidates: Mapping[str, Sequence[Setting]], *, dtype: mx.Dtype | None) -> Sizes:
    """Return the bytes of each layer's packed matrix at each candidate, scales and biases included.

    Args:
        model: dense.
        candidates: module path to settings.
        dtype: of the stored weights, scales and biases; None for the model's.
    """
    modules = dict(model.named_modules())
    return {
        path: {
            setting: packed_bytes(modules[path].weight.shape, setting, dtype or modules[path].weight.dtype)
            for setting in settings
        }
        for path, settings in candidates.items()
    }


def fixed_bytes(model: nn.Module, candidates: Mapping[str, Sequence[Setting]], *, dtype: mx.Dtype | None) -> int:
    """Return the bytes of all parameters outside of the budget's layers: norms, biases and dense layers."""
    chosen = {f"{path}.weight" for path in candidates}
    rest = [value for name, value in tree_flatten(model.parameters()) if name not in chosen]
    return sum(value.size * (dtype or value.dtype).size for value in rest)


def cheapest_plan(
    costs: Costs, sizes: Sizes, *, budget_bytes: int, budget_setting: str, parameters: int
) -> dict[str, Setting]:
    """Return the settings with the least sum of costs whose bytes are within a budget.

    The multiple-choice knapsack, by dynamic programming over the bytes: exact while a plan's bytes are at most 65,536
    multiples of a common unit; above that sizes are rounded up to such a unit.

    Args:
        costs: of each layer at each candidate.
        sizes: of each layer at each candidate, in bytes.
        budget_bytes: for these layers together.
        budget_setting: the key and value that set the budget, for the message.
        parameters: number of weights in these layers, for the message.

    Raises:
        WorkflowError: even the smallest candidates exceed the budget; names the smallest possible one.
    """
    _require_possible(sizes, budget_bytes, budget_setting, parameters)
    unit = _unit(sizes)
    room = min(budget_bytes // unit, sum(-(-max(one.values()) // unit) for one in sizes.values()))
    least = np.zeros(room + 1)
    chosen: list[np.ndarray] = []
    for path, options in costs.items():
        settings = list(options)
        totals = np.full((len(settings), room + 1), np.inf)
        for place, setting in enumerate(settings):
            size = -(-sizes[path][setting] // unit)
            if size <= room:
                totals[place, size:] = least[: room + 1 - size] + options[setting]
        best = totals.argmin(axis=0)
        chosen.append(best.astype(np.uint8))
        least = totals[best, np.arange(room + 1)]
    if not np.isfinite(least[room]):  # within the budget, but not with sizes rounded up
        return {path: min(options, key=options.__getitem__) for path, options in sizes.items()}
    plan: dict[str, Setting] = {}
    for (path, options), best in reversed(list(zip(costs.items(), chosen, strict=True))):
        setting = list(options)[int(best[room])]
        plan[path] = setting
        room -= -(-sizes[path][setting] // unit)
    return {path: plan[path] for path in costs}


def uniform_plans(sizes: Sizes, *, budget_bytes: int) -> list[dict[str, Setting]]:
    """Return the largest uniform plans within a budget: the same setting for every layer with a choice.

    Layers that have one candidate keep it.
    """
    shared = [set(options) for options in sizes.values() if len(options) > 1]
    plans = [
        {path: setting if len(options) > 1 else next(iter(options)) for path, options in sizes.items()}
        for setting in sorted(set.intersection(*shared) if shared else ())
    ]
    within = [plan for plan in plans if plan_bytes(plan, sizes) <= budget_bytes]
    return sorted(within, key=lambda plan: plan_bytes(plan, sizes), reverse=True)[:3]


def plan_bytes(plan: Mapping[str, Setting], sizes: Sizes) -> int:
    """Return the bytes of a plan's layers."""
    return sum(sizes[path][setting] for path, setting in plan.items())


def best_measured(
    model: nn.Module,
    plans: Sequence[Mapping[str, Setting]],
    tokens: mx.array,
    marks: mx.array,
    *,
    objective: Objective,
    dtype: mx.Dtype | None,
    batch_size: int,
) -> tuple[dict[str, Setting], list[float]]:
    """Return the plan with the least loss on some rows (the first of equal ones), and all losses in nats per token.

    Args:
        model: dense, in eval mode; unchanged.
        plans: to compare, at least one.
        tokens: (R, L + 1) ids.
        marks: (R, L + 1); see `data.token_file.Batch`.
        objective: the loss.
        dtype: of the stored weights; None for the model's.
        batch_size: rows in a forward pass.
    """
    losses = [
        _loss_of(model, plan, tokens, marks, objective=objective, dtype=dtype, batch_size=batch_size) for plan in plans
    ]
    return dict(plans[int(np.argmin(losses))]), losses


def _loss_of(
    model: nn.Module,
    plan: Mapping[str, Setting],
    tokens: mx.array,
    marks: mx.array,
    *,
    objective: Objective,
    dtype: mx.Dtype | None,
    batch_size: int,
) -> float:
    modules = dict(model.named_modules())
    dense = {path: modules[path].weight for path in plan}
    try:
        for path, setting in plan.items():
            stored = dense[path] if dtype is None else dense[path].astype(dtype)
            modules[path].weight = round_trip(stored, setting).astype(dense[path].dtype)
        total, count = 0.0, 0.0
        for begin in range(0, len(tokens), batch_size):
            end = begin + batch_size
            one, targets = objective(model, tokens[begin:end], marks[begin:end])
            mx.eval(one, targets)
            total, count = total + float(one), count + float(targets)
        return total / max(count, 1.0)
    finally:
        for path, weight in dense.items():
            modules[path].weight = weight


def _require_possible(sizes: Sizes, budget_bytes: int, setting: str, parameters: int) -> None:
    least = sum(min(options.values()) for options in sizes.values())
    if least > budget_bytes:
        needed, left = show_apart(least, max(budget_bytes, 0))
        raise WorkflowError(
            f"{setting}: the least possible is {8 * least / parameters:.3f} bits per weight ({needed}) in the layers "
            f"that are quantized, and the budget leaves {left} for them. Raise it, or allow fewer candidate_bits."
        )


def _unit(sizes: Sizes) -> int:
    common = math.gcd(*(size for options in sizes.values() for size in options.values()))
    most = sum(max(options.values()) for options in sizes.values())
    return common if most <= _MOST_TOTALS * common else -(-most // _MOST_TOTALS)
