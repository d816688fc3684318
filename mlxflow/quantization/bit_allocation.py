"""Allocate bits to layers within a budget of bytes: candidates, estimated costs, and the best measured plan."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.quantization import budget
from mlxflow.quantization import plan as plans
from mlxflow.quantization.sensitivity import Objective, measure_costs
from mlxflow.quantization.settings import Setting

# Bytes in a safetensors header: for each tensor besides its name, and for the provenance
_ENTRY_BYTES, _HEADER_BYTES = 80, 1024


class BudgetRequest(NamedTuple):
    """A budget for the size of a model, as configured.

    Attributes:
        bits_per_weight: of all parameters; 0 if a file size is given.
        file_bytes: of `model.safetensors`; 0 if bits per weight are given.
        candidate_bits: bits to choose from.
        setting: the setting and its value, for the message.
        key: of the table with the settings, for messages.
    """

    bits_per_weight: float
    file_bytes: int
    candidate_bits: tuple[int, ...]
    setting: str
    key: str


def allocate_bits(
    model: nn.Module,
    plan: plans.QuantizationPlan,
    request: BudgetRequest,
    calibration: tuple[mx.array, mx.array],
    *,
    rules: Sequence[plans.Rule],
    objective: Objective,
    batch_size: int,
) -> tuple[dict[str, Setting], list[float]]:
    """Return the layers of a plan with bits chosen within a budget, and the losses of the plans that were tried.

    Args:
        model: dense, in eval mode; unchanged.
        plan: of the layers; bits that a rule sets are kept.
        request: the budget.
        calibration: (R, L + 1) token ids and their marks; see `data.token_file.Batch`.
        rules: of the plan.
        objective: the loss.
        batch_size: rows in one forward pass.

    Returns:
        module path to setting, and losses in nats per token.

    Raises:
        WorkflowError: the mode does not support a candidate, or even the smallest candidates exceed the budget.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    candidates = {
        path: [setting]
        if plans.names_bits(path, rules)
        else [setting._replace(bits=bits) for bits in sorted(request.candidate_bits)]
        for path, setting in plan.layers.items()
    }
    plans.check_supported({str(one): one for some in candidates.values() for one in some}, request.key)
    parameters = sum(value.size for _, value in tree_flatten(model.parameters()))
    total = int(request.bits_per_weight * parameters / 8)
    if request.file_bytes:
        total = request.file_bytes - _header_bytes(model, candidates)
    sizes = budget.sizes_of(model, candidates, dtype=None)
    room = total - budget.fixed_bytes(model, candidates, dtype=None)
    rows, marks = calibration
    costs = measure_costs(model, candidates, rows, marks, objective=objective, dtype=None)
    cheapest = budget.cheapest_plan(
        costs,
        sizes,
        budget_bytes=room,
        budget_setting=request.setting,
        parameters=sum(modules[path].weight.size for path in candidates),
    )
    tried = [cheapest, *budget.uniform_plans(sizes, budget_bytes=room)]
    return budget.best_measured(model, tried, rows, marks, objective=objective, dtype=None, batch_size=batch_size)


def _header_bytes(model: nn.Module, packed: Mapping[str, Any]) -> int:
    """Return an upper bound of the header's size in bytes: names, shapes and provenance."""
    names = [name for name, _ in tree_flatten(model.parameters())]
    names += [f"{path}.{own}" for path in packed for own in ("scales", "biases")]
    return _HEADER_BYTES + sum(len(name) + _ENTRY_BYTES for name in names)
