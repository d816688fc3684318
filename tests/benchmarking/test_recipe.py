from typing import Any

import pytest

from mlxflow.benchmarking.recipe import Recipe, read_job
from mlxflow.errors import ArtifactError

SETTINGS: dict[str, Any] = {
    "method": "full",
    "batch_size": 4,
    "precision": "fp32",
    "checkpointing": "none",
    "arithmetic": "own",
    "deterministic": True,
    "kernels": [],
    "fused_loss": True,
    "masks_documents": False,
    "workers": 2,
    "prefetch_batches": 4,
    "optimizer": "adamw",
    "options": {"betas": [0.9, 0.95]},
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "learning_rate": 1e-2,
}


def _recipe(*, is_packed: bool = True, **settings: Any) -> Recipe:
    return Recipe.of(SETTINGS | settings, batch_size=4, is_packed=is_packed)


def test_each_ablation_differs_from_the_workflow_in_the_one_thing_it_names() -> None:
    workflow = _recipe(precision="bf16-pure", checkpointing="layers", kernels=["adamw"])
    found = {}
    for one in workflow.ablations():
        found[one.name] = {name for name in Recipe._fields[1:] if getattr(one, name) != getattr(workflow, name)}
    assert found == {
        "without compile": {"is_compiled"},
        "without run-ahead": {"runs_ahead"},
        "without fused_loss": {"loss"},
        "without own arithmetic": {"does_own_arithmetic"},
        "without own kernels": {"kernels"},
        "without joined updates": {"joins_updates"},
        "without packing": {"is_packed"},
        "without prefetch": {"workers", "prefetch_batches"},
        "without bf16-pure": {"precision"},
        "without checkpointing": {"checkpoint_every"},
    }


def test_what_a_workflow_does_not_use_is_not_switched_off() -> None:
    names = {one.name for one in _recipe(is_packed=False, fused_loss=False, arithmetic="mlx").ablations()}
    assert names == {
        "without compile",
        "without run-ahead",
        "without own cross-entropy",
        "without joined updates",
        "without prefetch",
    }


def test_the_baseline_is_naive_whatever_the_workflow_does() -> None:
    plain = _recipe().baseline()
    assert plain == _recipe(precision="bf16", checkpointing=2, fused_loss=False).baseline()
    assert not any((plain.is_compiled, plain.runs_ahead, plain.is_packed, plain.joins_updates))
    assert (plain.precision, plain.loss, plain.prefetch_batches, plain.is_trimmed) == ("fp32", "plain", 0, True)


@pytest.mark.parametrize(("checkpointing", "every"), [("none", 0), ("layers", 1), (3, 3)])
def test_checkpointing_is_taken_as_train_takes_it(checkpointing: Any, every: int) -> None:
    assert _recipe(checkpointing=checkpointing).checkpoint_every == every


def test_a_report_without_settings_names_the_command_that_makes_one() -> None:
    job, _ = read_job({"settings": SETTINGS}, "report.toml", "train")
    assert (job.optimizer, job.lora) == ("adamw", None)
    with pytest.raises(ArtifactError) as raised:
        read_job({}, "artifacts/train/report.toml", "train")
    assert str(raised.value) == (
        "artifacts/train/report.toml: does not say how it was trained (settings: 'settings'). Run: mlxflow run train"
    )
