from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxflow.benchmarking import interleaved_timing
from mlxflow.benchmarking.interleaved_timing import Measured, measure_recipes, rows_of
from mlxflow.benchmarking.recipe import Recipe
from mlxflow.benchmarking.throughput import FEWEST_ROUNDS
from mlxflow.benchmarking.time_budget import Budget
from mlxflow.data.token_file import Rows
from mlxflow.report.stage_reports.benchmark import DriftFigures
from tests.benchmarking.small_steps import open_runner, workflow_recipe
from tests.small_models import FREE


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
) -> tuple[list[Measured], DriftFigures | None]:
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

    recipes = [workflow_recipe()._replace(name=name) for name in plan]
    return measure_recipes(recipes, opened, num_steps=num_steps, memory_limit_bytes=limit, budget=FREE)


def test_a_recipe_out_of_memory_has_an_error_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = RuntimeError("[malloc] Unable to allocate 123456 bytes.")
    measured, _ = _measure(monkeypatch, {"baseline": failure, "workflow": (2.0, 400), "without compile": (3.0, 400)})
    rows = rows_of(measured, targets_per_row=lambda _: 3.0, tokens_per_row=lambda _: 5.0)
    assert [row.name for row in rows] == ["baseline", "workflow", "without compile"]
    assert rows[0].error == "does not fit: needs 123.5 kB and may use 1,100 GB"
    assert rows[1].tokens_per_second == 4 * 3 / 2.0
    assert rows[1].processed_tokens_per_second == 4 * 5 / 2.0
    assert rows[2].workflow_speedup == 1.5
    assert rows[2].verdict == "the workflow is faster"


def test_an_error_other_than_out_of_memory_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_peak_of_a_recipe_leaves_out_the_other_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
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
    recipes = [workflow_recipe(batch_size=size) for size in (32, 16, 32, 16)]
    measured, _ = measure_recipes(
        recipes, lambda recipe: open_runner(recipe, rows), num_steps=1, memory_limit_bytes=1 << 40, budget=FREE
    )
    large, small, *later = (one.peak_memory_bytes for one in measured)
    assert later == pytest.approx([large, small], rel=0.1)
    assert small < 0.7 * large


def test_a_difference_within_the_noise_has_the_verdict_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, drift = _measure(monkeypatch, {"workflow": (2.0, 400), "without prefetch": (2.0, 400)})
    (row,) = [
        row
        for row in rows_of(measured, targets_per_row=lambda _: 3.0, tokens_per_row=lambda _: 5.0)
        if row.name != "workflow"
    ]
    assert row.verdict == "noise"
    assert row.data_wait_share == pytest.approx(0.1)
    assert row.num_steps == 6
    assert drift == DriftFigures(name="workflow", batch_size=4, ratio=1.0, is_noticed=False)


def test_drift_notices_a_machine_that_slows_down(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 6 + 1 + interleaved_timing._PEAK_STEPS  # the first step, those of the peak, those that are timed
    taken = _Fake.run

    def throttled(self: _Fake, num_steps: int) -> list[float]:
        if self.targets >= 12 * turns:
            self._seconds = 2.5
        return taken(self, num_steps)

    monkeypatch.setattr(_Fake, "run", throttled)
    _, drift = _measure(monkeypatch, {"workflow": (2.0, 400)})
    assert drift == DriftFigures(name="workflow", batch_size=4, ratio=1.25, is_noticed=True)


def test_recipes_without_time_are_left_out_except_the_first_two(
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

    recipes = [workflow_recipe()._replace(name=name) for name in ("baseline", "workflow", "without compile")]
    measured, _ = measure_recipes(recipes, opened, num_steps=20, memory_limit_bytes=1 << 40, budget=budget)
    assert [one.recipe.name for one in measured] == ["baseline", "workflow", "without compile"]
    assert [one.num_steps for one in measured] == [FEWEST_ROUNDS, FEWEST_ROUNDS, 0]
    assert measured[2].error == "not measured: max_seconds = 30 did not suffice"
    assert lines == ["benchmark: 2 ways of a training step, 20 rounds: about 420 s, but max_seconds = 30 leaves 0 s"]
