"""Steps by every recipe: the same training, done differently."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.benchmarking import interleaved_timing
from mlxflow.benchmarking import step_runner as runners
from mlxflow.benchmarking.convergence import converge, with_same_loss
from mlxflow.benchmarking.interleaved_timing import Drift, Measured, measure_recipes, rows_of
from mlxflow.benchmarking.recipe import Recipe
from mlxflow.benchmarking.step_runner import Runner
from mlxflow.benchmarking.throughput import FEWEST_ROUNDS
from mlxflow.benchmarking.time_budget import Budget
from mlxflow.benchmarking.unpacked_rows import InlineLoader, apart, holds_several
from mlxflow.data.token_file import Rows
from mlxflow.kernels import model_kernels
from mlxflow.training import build
from tests.benchmarking.test_recipe import SETTINGS
from tests.kernels.stand_ins import let_references_serve, uncompiled  # noqa: F401
from tests.small_models import FREE, llama


def _packed() -> Rows:
    """Return rows of nine tokens: two documents each, and a place left empty."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, 50, (24, 9)).astype(np.uint16)
    tokens[:, 8] = 0
    return Rows(tokens, np.tile(np.array([2, 3, 3, 3, 3, 4, 5, 5, 0], np.uint8), (24, 1)))


def _workflow(**settings: Any) -> Recipe:
    return Recipe.of(SETTINGS.replace(**settings), is_packed=True)


def _subject(recipe: Recipe) -> build.Subject:
    model, _ = llama()
    build.prepare_model(model, recipe.settings, adapter_seed=0)
    return build.Subject(model, recipe.settings, 50, 8)


@contextmanager
def _open(recipe: Recipe, rows: Rows | None = None) -> Iterator[Runner]:
    given = rows or (_packed() if recipe.is_packed else apart(_packed(), count=48, seed=0))
    with Runner.running(_subject(recipe), given, recipe=recipe, seed=0) as runner:
        yield runner


@pytest.mark.parametrize("change", [one for one in _workflow(checkpoint_every=1).ablations() if one.is_packed])
def test_every_way_of_a_step_gives_the_same_losses(change: Recipe) -> None:
    losses = []
    for recipe in (_workflow(), change):
        with _open(recipe) as runner:
            losses.append(runner.run(4))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] != losses[0][0]


def test_recorded_kernels_serve_until_they_are_switched_off(
    monkeypatch: pytest.MonkeyPatch,
    uncompiled: None,  # noqa: F811
) -> None:
    calls = let_references_serve(monkeypatch)
    known = model_kernels.choose_for(llama()[0], model_kernels.TrainingTraits("fp32", 8), recorded=[])
    recipe = _workflow(kernels=tuple(known.refused))
    (without,) = (one for one in recipe.ablations() if one.name == "without own kernels")
    with _open(recipe) as runner:
        losses = runner.run(3)
    assert {"rms_norm.kernel_gradients", "gated_activation.kernel_joined", "adamw.kernel"} <= calls.keys()
    calls.clear()
    for one in (without, recipe.baseline()):
        with _open(one, _packed()) as runner:
            assert runner.run(3) == pytest.approx(losses, rel=1e-4)
    assert not calls


def test_the_naive_way_learns_the_same_from_rows_of_one_document_each() -> None:
    rows = apart(_packed(), count=48, seed=0)
    losses = []
    for recipe in (_workflow().baseline(), _workflow()):
        with _open(recipe, rows) as runner:
            losses.append(runner.run(4))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bf16_is_switched_off_in_the_weights_themselves() -> None:
    types = []
    for recipe in (_workflow(precision="bf16-pure"), _workflow()):
        subject = _subject(recipe)
        with Runner.running(subject, _packed(), recipe=recipe, seed=0) as runner:
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
        with _open(_workflow()._replace(uses_mlx_loss=True, is_compiled=is_compiled)) as runner:
            runner.run(5)
        counts.append(len(calls))
    assert counts == [1, 5]


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_without_run_ahead_no_step_is_sent_before_the_last_one_is_there(
    monkeypatch: pytest.MonkeyPatch, runs_ahead: bool
) -> None:
    order: list[str] = []
    evaluate, send = mx.eval, mx.async_eval

    def noting(word: str, function: Any) -> Any:
        def noted(*given: Any) -> None:
            order.append(word)
            function(*given)

        return noted

    with _open(_workflow()._replace(runs_ahead=runs_ahead)) as runner:
        runner.run(1)
        monkeypatch.setattr(mx, "eval", noting("wait", evaluate))
        monkeypatch.setattr(mx, "async_eval", noting("send", send))
        runner.run(3)
    assert order == (["send", "send", "wait", "send", "wait", "wait"] if runs_ahead else ["wait"] * 4)


def test_what_is_loaded_in_line_is_gathered_when_it_is_asked_for() -> None:
    rows = apart(_packed(), count=48, seed=0)
    batch = next(InlineLoader(rows, batch_size=4, seed=0, trims=True))
    longest = int(max((mark > 0).sum() for mark in np.array(batch.marks)))
    assert batch.tokens.shape == (4, longest)
    assert longest <= 5 < rows.tokens.shape[1]
    with _open(_workflow().baseline()) as runner:
        assert isinstance(runner._loader, InlineLoader)
    with _open(_workflow()) as runner:
        assert not isinstance(runner._loader, InlineLoader)


def test_rows_of_one_piece_each_hold_every_token_that_is_learnt() -> None:
    packed = _packed()
    rows = apart(packed, count=10**6, seed=3)
    assert rows.num_rows == 48
    assert holds_several(packed)
    assert not holds_several(rows)
    assert (rows.marks & 1).sum() == (packed.marks & 1).sum()
    ends = sorted(tuple(row[row > 0]) for row in rows.tokens.astype(int))
    assert ends == sorted([tuple(r[:5]) for r in packed.tokens.astype(int)] + [tuple(r[5:8]) for r in packed.tokens])


def test_a_step_is_taken_apart_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    with _open(_workflow()) as runner:
        runner.run(1)
        ticks = iter([0.0, 1.0, 1.0, 1.5, 3.0, 7.0, 7.25])  # two of them are the loader's own
        monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
        parts = runner.take_apart()
    assert parts[2:] == (4.0, 0.25)
    assert sum(parts) == 7.25


# --- recipes against one another


class _Fake:
    """A runner that takes no time, holds what it is told to and needs so much more in a step."""

    def __init__(self, clock: list[float], seconds: float, held: int, needed: int = 0) -> None:
        self._clock, self._seconds, self.targets, self.waited_seconds = clock, seconds, 0, 0.0
        self._needed = needed
        self.array = mx.array(np.zeros(held, np.uint8))  # copied at once, by no thread of MLX's

    def run(self, num_steps: int) -> list[float]:
        mx.array(np.zeros(self._needed, np.uint8))
        self._clock[0] += self._seconds * num_steps
        self.waited_seconds += 0.1 * self._seconds * num_steps
        self.targets += 12 * num_steps
        return [1.0] * num_steps


def _measure(
    monkeypatch: pytest.MonkeyPatch, plan: dict[str, Any], *, limit: int = 1 << 40, num_steps: int = 6
) -> tuple[list[Measured], Drift | None]:
    """Measure fake recipes: each takes so many seconds, or fails so."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        "mlxflow.benchmarking.interleaved_timing.fixed_work", lambda: lambda: clock.__setitem__(0, clock[0] + 1)
    )

    @contextmanager
    def opened(recipe: Recipe) -> Iterator[Any]:
        found = plan[recipe.name]
        if isinstance(found, Exception):
            raise found
        yield _Fake(clock, *found)

    recipes = [_workflow()._replace(name=name) for name in plan]
    return measure_recipes(recipes, opened, num_steps=num_steps, memory_limit_bytes=limit, budget=FREE)


def test_a_recipe_that_does_not_fit_says_so_and_the_others_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = RuntimeError("[malloc] Unable to allocate 123456 bytes.")
    measured, _ = _measure(monkeypatch, {"baseline": failure, "workflow": (2.0, 400), "without compile": (3.0, 400)})
    rows = rows_of(measured, targets_per_row=lambda _: 3.0, tokens_per_row=lambda _: 5.0)
    assert [row["name"] for row in rows] == ["baseline", "workflow", "without compile"]
    assert rows[0]["error"].startswith("does not fit: needs 123,456 bytes and may use ")
    assert rows[1]["tokens_per_second"] == 4 * 3 / 2.0
    assert rows[2]["workflow_speedup"] == 1.5
    assert rows[2]["verdict"] == "the workflow is faster"


def test_another_failure_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="a mistake"):
        _measure(monkeypatch, {"workflow": RuntimeError("a mistake")})


def test_recipes_that_do_not_fit_together_are_timed_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    each = 1 << 22
    limit = mx.get_active_memory() + each * 3 // 2
    measured, _ = _measure(monkeypatch, {"baseline": (1.0, each), "workflow": (2.0, each)}, limit=limit)
    assert [(one.error, one.group) for one in measured] == [("", 0), ("", 1)]
    assert all(one.peak_memory_bytes == pytest.approx(each, rel=0.01) for one in measured)
    too_large, _ = _measure(monkeypatch, {"baseline": (1.0, 2 * each), "workflow": (2.0, each)}, limit=limit)
    assert [bool(one.error) for one in too_large] == [True, False]


def test_a_peak_is_a_recipes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mb = 1 << 20
    plan = {"workflow": (1.0, 3 * mb, 5 * mb), "baseline": (1.0, 9 * mb, 20 * mb), "without compile": (1.0, mb, 2 * mb)}
    for names in (list(plan), list(plan)[::-1]):
        measured, _ = _measure(monkeypatch, {name: plan[name] for name in names})
        found = {one.recipe.name: one.peak_memory_bytes for one in measured}
        assert found == {name: held + needed for name, (_, held, needed) in plan.items()}


def test_the_peak_of_real_steps_does_not_depend_on_the_recipes_before_it() -> None:
    # how far the host is ahead of the device within a step is chance, the less so the larger a batch
    random = np.random.default_rng(0)
    rows = Rows(random.integers(1, 50, (64, 65)).astype(np.uint16), np.full((64, 65), 3, np.uint8))
    recipes = [_workflow(batch_size=size) for size in (32, 16, 32, 16)]
    measured, _ = measure_recipes(
        recipes, lambda recipe: _open(recipe, rows), num_steps=1, memory_limit_bytes=1 << 40, budget=FREE
    )
    large, small, *later = (one.peak_memory_bytes for one in measured)
    assert later == pytest.approx([large, small], rel=0.1)
    assert small < 0.7 * large


def test_a_difference_inside_the_noise_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, drift = _measure(monkeypatch, {"workflow": (2.0, 400), "without prefetch": (2.0, 400)})
    (row,) = [
        row
        for row in rows_of(measured, targets_per_row=lambda _: 3.0, tokens_per_row=lambda _: 5.0)
        if row["name"] != "workflow"
    ]
    assert row["verdict"] == "noise"
    assert row["data_wait_share"] == pytest.approx(0.1)
    assert row["num_steps"] == 6
    assert drift == ("workflow", 4, 1.0, False)


def test_a_machine_that_slows_down_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 6 + 1 + interleaved_timing._PEAK_STEPS  # the first step, those of the peak, those that are timed
    taken = _Fake.run

    def throttled(self: _Fake, num_steps: int) -> list[float]:
        if self.targets >= 12 * turns:
            self._seconds = 2.5
        return taken(self, num_steps)

    monkeypatch.setattr(_Fake, "run", throttled)
    _, drift = _measure(monkeypatch, {"workflow": (2.0, 400)})
    assert drift == ("workflow", 4, 1.25, True)


# --- convergence


def test_curves_tell_what_each_needed_for_the_loss_that_all_reached() -> None:
    curves = [
        {"name": "baseline", "tokens": [1, 2, 3], "seconds": [0.0, 5.0, 9.0], "loss": [4.0, 3.0, 2.5]},
        {"name": "workflow", "tokens": [1, 2, 3], "seconds": [0.0, 2.0, 4.0], "loss": [4.0, 2.4, 2.0]},
    ]
    found = with_same_loss(curves)
    assert [(one["same_loss"], one["tokens_to_loss"], one["seconds_to_loss"]) for one in found] == [
        (2.5, 3, 9.0),
        (2.5, 2, 2.0),
    ]


def test_a_new_model_learns_both_ways() -> None:
    with _open(_workflow().baseline()) as baseline, _open(_workflow()) as workflow:
        curves = converge({"baseline": baseline, "workflow": workflow}, num_steps=30, budget=FREE)
    for curve in curves:
        assert curve["steps"] == list(range(1, 31))
        assert curve["loss"][-1] < curve["loss"][0]
        assert curve["tokens"] == sorted(curve["tokens"])
        assert curve["seconds"][0] == 0.0 < curve["seconds"][1]


def test_full_rows_at_the_beginning_do_not_hide_packed_ones() -> None:
    packed = _packed()
    alone = np.full((9000, 9), 3, np.uint8)
    marks = np.concatenate([alone, np.tile(packed.marks, (40, 1))])
    assert holds_several(Rows(np.zeros_like(marks), marks))
    assert not holds_several(Rows(np.zeros_like(alone), alone))


def test_ways_for_which_there_is_no_time_are_left_out_and_the_first_two_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        "mlxflow.benchmarking.interleaved_timing.fixed_work", lambda: lambda: clock.__setitem__(0, clock[0] + 1)
    )
    lines: list[str] = []
    budget = Budget(30, task="benchmark", clock=lambda: clock[0], say=lines.append)

    @contextmanager
    def opened(recipe: Recipe) -> Iterator[Any]:
        yield _Fake(clock, 10.0, 1000)

    recipes = [_workflow()._replace(name=name) for name in ("baseline", "workflow", "without compile")]
    measured, _ = measure_recipes(recipes, opened, num_steps=20, memory_limit_bytes=1 << 40, budget=budget)
    assert [one.recipe.name for one in measured] == ["baseline", "workflow", "without compile"]
    assert [one.num_steps for one in measured] == [FEWEST_ROUNDS, FEWEST_ROUNDS, 0]
    assert measured[2].error == "not measured: max_seconds = 30 did not suffice"
    assert lines == ["benchmark: 2 ways of a training step, 20 rounds: about 420 s, but max_seconds = 30 leaves 0 s"]
