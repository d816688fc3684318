"""Allocate bits and group sizes to layers within a budget of bytes: candidates, and plans to measure."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.quantization import budget
from mlxflow.quantization import plan as plans
from mlxflow.quantization.sensitivity import Costs
from mlxflow.quantization.settings import Setting

# Bytes in a safetensors header: for each tensor besides its name, and for the provenance
_ENTRY_BYTES, _HEADER_BYTES = 80, 1024


#: The name of a plan in which layers have settings of their own.
MIXED = "mixed"


class BudgetRequest(NamedTuple):
    """A budget for the size of a model, as configured.

    Attributes:
        bits_per_weight: of all parameters; 0 if a file size is given.
        file_bytes: of `model.safetensors`; 0 if bits per weight are given.
        candidate_bits: bits to choose from.
        candidate_group_sizes: group sizes to choose from.
        setting: the setting and its value, for the message.
        key: of the table with the settings, for messages.
    """

    bits_per_weight: float
    file_bytes: int
    candidate_bits: tuple[int, ...]
    candidate_group_sizes: tuple[int, ...]
    setting: str
    key: str


class BudgetRoom(NamedTuple):
    """What a budget leaves for the layers of a plan.

    Attributes:
        candidates: module path to settings.
        sizes: of each layer at each candidate, in bytes.
        budget_bytes: for these layers together.
        parameters: number of weights in them.
    """

    candidates: dict[str, list[Setting]]
    sizes: budget.Sizes
    budget_bytes: int
    parameters: int


def room_of(
    model: nn.Module, plan: plans.QuantizationPlan, request: BudgetRequest, *, rules: Sequence[plans.Rule]
) -> BudgetRoom:
    """Return the candidates of each layer and the bytes for all of them.

    Args:
        model: dense.
        plan: of the layers; bits and group sizes that a rule sets are kept.
        request: the budget.
        rules: of the plan.

    Raises:
        WorkflowError: the mode does not support a candidate.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    candidates = {
        path: _candidates(path, setting, modules[path].weight.shape[-1], request, rules)
        for path, setting in plan.layers.items()
    }
    plans.check_supported({str(one): one for some in candidates.values() for one in some}, request.key)
    total_parameters = sum(value.size for _, value in tree_flatten(model.parameters()))
    total = int(request.bits_per_weight * total_parameters / 8)
    if request.file_bytes:
        total = request.file_bytes - _header_bytes(model, candidates)
    sizes = budget.sizes_of(model, candidates, dtype=None)
    room = total - budget.fixed_bytes(model, candidates, dtype=None)
    return BudgetRoom(candidates, sizes, room, sum(modules[path].weight.size for path in candidates))


def _candidates(
    path: str, setting: Setting, width: int, request: BudgetRequest, rules: Sequence[plans.Rule]
) -> list[Setting]:
    """Return the settings that a budget may give a layer."""
    if setting.stored_mode != "affine":
        return [setting]
    bits = [setting.bits] if plans.names_key(path, rules, "bits") else sorted(request.candidate_bits)
    sizes = [size for size in sorted(request.candidate_group_sizes) if width % size == 0] or [setting.group_size]
    if plans.names_key(path, rules, "group_size"):
        sizes = [setting.group_size]
    return [setting._replace(bits=number, group_size=size) for number in bits for size in sizes]


def plans_within(
    room: BudgetRoom, costs: Costs, request: BudgetRequest, *, most_uniform: int
) -> dict[str, dict[str, Setting]]:
    """Return plans to measure by name: the mixed one of least cost, and uniform ones of the same size.

    Args:
        room: of the budget.
        costs: of each layer at each candidate.
        request: the budget.
        most_uniform: number of uniform plans: of those nearest to the budget, the ones of least cost.

    Raises:
        WorkflowError: even the smallest candidates exceed the budget.
    """
    cheapest = mixed_plan(room, costs, request)
    uniform = budget.uniform_plans(room.sizes, budget_bytes=room.budget_bytes)
    uniform.sort(key=lambda plan: sum(costs[path][setting] for path, setting in plan.items()))
    made = {MIXED: cheapest}
    for plan in uniform[:most_uniform]:
        if plan != cheapest:
            made[_name_of(plan, room)] = plan
    return made


def mixed_plan(room: BudgetRoom, costs: Costs, request: BudgetRequest) -> dict[str, Setting]:
    """Return the plan of least cost; see `plans_within`."""
    return budget.cheapest_plan(
        costs,
        room.sizes,
        budget_bytes=room.budget_bytes,
        budget_setting=request.setting,
        parameters=room.parameters,
    )


def _name_of(plan: Mapping[str, Setting], room: BudgetRoom) -> str:
    shared = next((plan[path] for path, some in room.candidates.items() if len(some) > 1), None)
    shared = shared or next(iter(plan.values()))
    return f"uniform {shared.bits} bits, groups of {shared.group_size}"


def _header_bytes(model: nn.Module, packed: Mapping[str, Any]) -> int:
    """Return an upper bound of the header's size in bytes: names, shapes and provenance."""
    names = [name for name, _ in tree_flatten(model.parameters())]
    names += [f"{path}.{own}" for path in packed for own in ("scales", "biases")]
    return _HEADER_BYTES + sum(len(name) + _ENTRY_BYTES for name in names)
