from typing import Any

import pytest

from mlxflow.benchmarking.recipe import Recipe
from mlxflow.training.settings import Recomputation, TrainingSettings

SETTINGS = TrainingSettings(
    batch_size=4, schedule="constant", warmup_steps=1, learning_rate=1e-2, fused_loss=True, workers=2
)


def _recipe(*, is_packed: bool = True, **settings: Any) -> Recipe:
    return Recipe.of(SETTINGS.replace(**settings), is_packed=is_packed)


def _differences(one: Recipe, other: Recipe) -> set[str]:
    names = [name for name in Recipe._fields[1:] if name != "settings" and getattr(one, name) != getattr(other, name)]
    settings = [
        name
        for name in TrainingSettings.__struct_fields__
        if getattr(one.settings, name) != getattr(other.settings, name)
    ]
    return {*names, *settings}


def test_each_ablation_differs_from_the_workflow_in_the_one_thing_it_names() -> None:
    workflow = _recipe(precision="bf16-pure", checkpoint_every=1, kernels=("adamw",))
    assert {one.name: _differences(one, workflow) for one in workflow.ablations()} == {
        "without compile": {"is_compiled"},
        "without run-ahead": {"runs_ahead"},
        "without fused_loss": {"uses_mlx_loss"},
        "without own arithmetic": {"replaces_operations"},
        "without own kernels": {"kernels"},
        "without joined updates": {"joins_updates"},
        "without packing": {"is_packed"},
        "without prefetch": {"prefetches"},
        "without bf16-pure": {"precision"},
        "without checkpointing": {"checkpoint_every"},
    }


def test_optimizations_that_a_workflow_does_not_use_are_not_ablated() -> None:
    names = {one.name for one in _recipe(is_packed=False, fused_loss=False).ablations()}
    assert names == {
        "without compile",
        "without run-ahead",
        "without own cross-entropy",
        "without own arithmetic",
        "without joined updates",
        "without trimming",
        "without prefetch",
    }


def test_the_baseline_is_naive_for_every_workflow() -> None:
    plain = _recipe().baseline()
    assert plain == _recipe(precision="bf16", checkpoint_every=2, fused_loss=False).baseline()
    assert not any((plain.is_compiled, plain.runs_ahead, plain.is_packed, plain.joins_updates, plain.prefetches))
    assert (plain.settings.precision, plain.uses_mlx_loss, plain.is_trimmed) == ("fp32", True, True)


@pytest.mark.parametrize(
    ("checkpointing", "layers"),
    [("none", (0, 1)), ("layers", (1, 1)), ("pairs", (1, 2)), ("auto", (1, 1)), (3, (3, 1))],
)
def test_the_checkpointing_setting_says_which_layers_are_recomputed(
    checkpointing: Any, layers: tuple[int, int]
) -> None:
    assert Recomputation.of(checkpointing) == layers
