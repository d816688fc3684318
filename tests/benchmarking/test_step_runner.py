"""Steps by every recipe: the same training, done differently."""

from typing import Any

import mlx.core as mx
import pytest

from mlxflow.benchmarking import step_runner as runners
from mlxflow.benchmarking.recipe import Recipe
from mlxflow.benchmarking.step_runner import Runner
from mlxflow.benchmarking.unpacked_rows import apart
from mlxflow.kernels import model_kernels
from tests.benchmarking.small_steps import open_runner, packed_rows, subject_of, workflow_recipe
from tests.kernels.stand_ins import uncompiled, use_references  # noqa: F401
from tests.small_models import llama


@pytest.mark.parametrize("change", [one for one in workflow_recipe(checkpoint_every=1).ablations() if one.is_packed])
def test_every_kind_of_step_gives_the_same_losses(change: Recipe) -> None:
    losses = []
    for recipe in (workflow_recipe(), change):
        with open_runner(recipe) as runner:
            losses.append(runner.run(4))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] != losses[0][0]


def test_recorded_kernels_are_used_until_they_are_switched_off(
    monkeypatch: pytest.MonkeyPatch,
    uncompiled: None,  # noqa: F811
) -> None:
    calls = use_references(monkeypatch)
    known = model_kernels.choose_for(llama()[0], model_kernels.TrainingTraits("fp32", 8), recorded=[])
    recipe = workflow_recipe(kernels=tuple(known.refused))
    (without,) = (one for one in recipe.ablations() if one.name == "without own kernels")
    with open_runner(recipe) as runner:
        losses = runner.run(3)
    assert {"rms_norm.kernel_gradients", "gated_activation.kernel_joined", "adamw.kernel"} <= calls.keys()
    calls.clear()
    for one in (without, recipe.baseline()):
        with open_runner(one, packed_rows()) as runner:
            assert runner.run(3) == pytest.approx(losses, rel=1e-4)
    assert not calls


def test_the_naive_baseline_has_the_same_losses_on_rows_of_one_document() -> None:
    rows = apart(packed_rows(), count=48, seed=0)
    losses = []
    for recipe in (workflow_recipe().baseline(), workflow_recipe()):
        with open_runner(recipe, rows) as runner:
            losses.append(runner.run(4))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_switching_off_bf16_casts_the_weights() -> None:
    types = []
    for recipe in (workflow_recipe(precision="bf16-pure"), workflow_recipe()):
        subject = subject_of(recipe)
        with Runner.running(subject, packed_rows(), recipe=recipe, seed=0) as runner:
            runner.run(1)
            types.append(subject.model.model.norm.weight.dtype)
    assert types == [mx.bfloat16, mx.float32]


def test_a_compiled_step_is_traced_once_and_another_one_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    plain = runners._mlx_objective

    def counting(masks: bool) -> Any:
        objective = plain(masks)

        def counted(*given: Any) -> Any:
            calls.append(None)
            return objective(*given)

        return counted

    monkeypatch.setattr(runners, "_mlx_objective", counting)
    counts = []
    for is_compiled in (True, False):
        calls.clear()
        with open_runner(workflow_recipe()._replace(uses_mlx_loss=True, is_compiled=is_compiled)) as runner:
            runner.run(5)
        counts.append(len(calls))
    assert counts == [1, 5]


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_without_run_ahead_a_step_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch, runs_ahead: bool) -> None:
    order: list[str] = []
    evaluate, send = mx.eval, mx.async_eval

    def noting(word: str, function: Any) -> Any:
        def noted(*given: Any) -> None:
            order.append(word)
            function(*given)

        return noted

    with open_runner(workflow_recipe()._replace(runs_ahead=runs_ahead)) as runner:
        runner.run(1)
        monkeypatch.setattr(mx, "eval", noting("wait", evaluate))
        monkeypatch.setattr(mx, "async_eval", noting("send", send))
        runner.run(3)
    assert order == (["send", "send", "wait", "send", "wait", "wait"] if runs_ahead else ["wait"] * 4)


def test_the_parts_of_a_step_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_runner(workflow_recipe()) as runner:
        runner.run(1)
        ticks = iter([0.0, 1.0, 1.0, 1.5, 3.0, 7.0, 7.25])  # two of them are the loader's own
        monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
        parts = runner.time_parts()
    assert parts[2:] == (4.0, 0.25)
    assert sum(parts) == 7.25
