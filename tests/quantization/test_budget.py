import itertools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.messages.errors import WorkflowError
from mlxflow.quantization.budget import best_measured, cheapest_plan, fixed_bytes, plan_bytes, sizes_of, uniform_plans
from mlxflow.quantization.codec import pack
from mlxflow.quantization.settings import Setting
from mlxflow.training.objective import plain_objective
from tests.small_models import llama

CANDIDATES = [Setting("affine", bits, 64) for bits in (2, 3, 4, 6, 8)]
OBJECTIVE = plain_objective(masks_documents=False)


def _llama() -> nn.Module:
    model, _ = llama(vocab_size=60, hidden_size=64, num_layers=1, intermediate_size=128)
    model.eval()
    return model


def _candidates(model: nn.Module) -> dict[str, list[Setting]]:
    return {path: CANDIDATES for path, layer in model.named_modules() if hasattr(layer, "to_quantized")}


def _rows(count: int = 4) -> tuple[mx.array, mx.array]:
    tokens = mx.random.randint(0, 60, (count, 9), key=mx.random.key(0))
    return tokens, mx.full(tokens.shape, 3, mx.uint8)


def _table(layers: int, seed: int) -> tuple[Any, Any]:
    """Return costs that fall with the bits, and sizes, of layers of several widths."""
    random = np.random.default_rng(seed)
    costs, sizes = {}, {}
    for number in range(layers):
        width = int(random.integers(1, 9))
        prices = np.sort(random.lognormal(0, 2, len(CANDIDATES)))[::-1]
        costs[f"layer.{number}"] = dict(zip(CANDIDATES, prices.tolist(), strict=True))
        sizes[f"layer.{number}"] = {one: 64 * width * one.bits + 17 * width for one in CANDIDATES}
    return costs, sizes


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.8, 1.5])
def test_the_plan_has_the_least_cost_within_the_budget(seed: int, share: float) -> None:
    costs, sizes = _table(5, seed)
    least, most = (sum(pick(one.values()) for one in sizes.values()) for pick in (min, max))
    budget = int(least + share * (most - least))
    plan = cheapest_plan(costs, sizes, budget_bytes=budget, budget_setting="", parameters=1)
    every = [dict(zip(costs, choice, strict=True)) for choice in itertools.product(CANDIDATES, repeat=len(costs))]
    best = min(
        sum(costs[path][setting] for path, setting in one.items()) for one in every if plan_bytes(one, sizes) <= budget
    )
    assert plan_bytes(plan, sizes) <= budget
    assert list(plan) == list(costs)
    assert sum(costs[path][setting] for path, setting in plan.items()) == pytest.approx(best)


def test_sizes_without_a_common_unit_still_keep_the_budget_and_fill_it() -> None:
    random = np.random.default_rng(0)
    sizes = {f"{n}": {one: int(one.bits * random.integers(10**7, 2 * 10**7)) for one in CANDIDATES} for n in range(40)}
    costs = {path: {one: 4.0**-one.bits * (1 + place) for one in CANDIDATES} for place, path in enumerate(sizes)}
    budget = sum(one[CANDIDATES[2]] for one in sizes.values())
    plan = cheapest_plan(costs, sizes, budget_bytes=budget, budget_setting="", parameters=1)
    assert 0.99 * budget < plan_bytes(plan, sizes) <= budget


def test_an_impossible_budget_is_an_error_with_the_smallest_size() -> None:
    costs, sizes = _table(3, 0)
    least = sum(min(one.values()) for one in sizes.values())
    left = least // 2
    with pytest.raises(WorkflowError) as caught:
        cheapest_plan(costs, sizes, budget_bytes=left, budget_setting='quantize.target_size = "1 kB"', parameters=1000)
    assert str(caught.value) == (
        f'quantize.target_size = "1 kB": the least possible is {8 * least / 1000:.3f} bits per weight '
        f"({show_bytes(least)}) in the layers that are quantized, and the budget leaves {show_bytes(left)} for them. "
        "Raise it, or allow fewer candidate_bits."
    )


def test_uniform_plans_are_within_the_budget_and_keep_what_is_fixed() -> None:
    model = _llama()
    fixed = Setting("affine", 8, 32)
    candidates = _candidates(model) | {"model.embed_tokens": [fixed]}
    sizes = sizes_of(model, candidates, dtype=None)
    budget = plan_bytes({path: one[min(2, len(one) - 1)] for path, one in candidates.items()}, sizes)
    plans = uniform_plans(sizes, budget_bytes=budget)
    assert [plan["model.layers.0.mlp.up_proj"].bits for plan in plans] == [4, 3, 2]
    assert all(plan["model.embed_tokens"] == fixed for plan in plans)


@pytest.mark.parametrize("dtype", [None, mx.bfloat16])
def test_bytes_are_those_of_the_packed_model(dtype: mx.Dtype | None) -> None:
    model = _llama()
    candidates = _candidates(model)
    sizes = sizes_of(model, candidates, dtype=dtype)
    modules = dict(model.named_modules())
    for path, settings in candidates.items():
        for one in settings:
            assert sizes[path][one] == pack(modules[path].weight.astype(dtype or mx.float32), one).nbytes
    norms = 3 * 64
    assert fixed_bytes(model, candidates, dtype=dtype) == norms * (dtype or mx.float32).size


def test_the_plan_with_the_least_loss_is_taken() -> None:
    model = _llama()
    tokens, marks = _rows()
    plans = [dict.fromkeys(_candidates(model), CANDIDATES[bits]) for bits in (0, 4, 1)]
    before = mx.array(model(tokens))
    best, losses = best_measured(model, plans, tokens, marks, objective=OBJECTIVE, dtype=None, batch_size=3)
    assert best == plans[int(np.argmin(losses))]
    assert len(set(losses)) == 3
    assert mx.array_equal(model(tokens), before)
    dense = OBJECTIVE(model, tokens, marks)
    assert (
        abs(losses[1] - float(dense[0]) / float(dense[1])) < abs(losses[0] - float(dense[0]) / float(dense[1])) + 1e-3
    )
