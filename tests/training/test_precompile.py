"""A rehearsal leaves the model as it was, whatever becomes of it."""

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows
from mlxflow.kernels import codegen
from mlxflow.training.adapters import add_adapters
from mlxflow.training.objective import plain_objective
from mlxflow.training.optimizers import make_optimizer, make_schedule
from mlxflow.training.precompile import precompile_step
from mlxflow.training.settings import AdapterShape
from mlxflow.training.step import Step
from mlxflow.training.update import Update
from tests.small_models import llama

ROWS = Rows(np.ones((4, 17), np.uint16), np.full((4, 17), 3, np.uint8))


def _model() -> Any:
    model, _ = llama()
    add_adapters(model, AdapterShape("lora", 2, 20.0, 0.5, 0, ("*",)), seed=1, key="train.lora.keys")
    model.train()
    mx.eval(model.parameters())
    return model


def _maker(model: Any, steps: list[Step]) -> Callable[[], Step]:
    def make() -> Step:
        schedule = make_schedule(
            name="constant", learning_rate=0.1, final_learning_rate=0, num_steps=5, warmup_steps=0, decay_steps=0
        )
        optimizer = make_optimizer(name="adamw", schedule=schedule, weight_decay=0.1, options={})
        update = Update(model, optimizer, max_grad_norm=1.0, has_masters=False)
        steps.append(Step(model, update, plain_objective(masks_documents=False)))
        return steps[-1]

    return make


def _random_key() -> list[int]:
    (key,) = cast("Any", mx.random.state)
    return list(key.tolist())


@pytest.mark.parametrize("is_one_pass", [True, False])
def test_precompile_runs_a_step_and_undoes_it(is_one_pass: bool, capfd: pytest.CaptureFixture[str]) -> None:
    model = _model()
    steps: list[Step] = []
    before = dict(tree_flatten(model.parameters()))
    mx.random.seed(7)
    key = _random_key()
    precompile_step(model, _maker(model, steps), ROWS, is_one_pass=is_one_pass, masks_documents=False)
    assert not capfd.readouterr().err
    (step,) = steps
    moments = dict(tree_flatten(step.state[1]["optimizer"]))
    assert any(bool(mx.any(value != 0)) for name, value in moments.items() if name.rpartition(".")[2] == "m")
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(mx.array_equal(value, before[name]) for name, value in after.items())
    assert _random_key() == key, "dropout drew some"
    assert model.training


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("no such option")])
def test_a_failed_precompile_is_reported_and_undone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    model = _model()
    steps: list[Step] = []
    before = dict(tree_flatten(model.parameters()))

    def failing(*_: Any, **__: Any) -> None:
        model.eval()
        raise error

    monkeypatch.setattr("mlxflow.training.precompile.measure_perplexity", failing)
    precompile_step(model, _maker(model, steps), ROWS, is_one_pass=True, masks_documents=False)
    assert capfd.readouterr().err == f"mlxflow: not all of the first step was compiled ahead ({error})\n"
    after = dict(tree_flatten(model.parameters()))
    assert len(steps) == 1
    assert all(mx.array_equal(value, before[name]) for name, value in after.items())
    assert model.training


@pytest.mark.parametrize("words", ["metal", "cuda"])
def test_without_precompiled_programs_no_unverified_kernel_is_launched(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: str
) -> None:
    model = _model()
    steps: list[Step] = []
    monkeypatch.setattr(codegen, "language", lambda: words)
    monkeypatch.setattr(codegen, "programs_run", lambda: False)
    precompile_step(model, _maker(model, steps), ROWS, is_one_pass=True, masks_documents=False)
    assert not steps
    assert "runs no precompiled programs" in capfd.readouterr().err
