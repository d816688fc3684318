"""Time several recipes in turns, with the peak memory and compile time of each."""

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

import mlx.core as mx
import msgspec

from mlxflow.benchmarking.machine_speed import fixed_work
from mlxflow.benchmarking.recipe import Recipe
from mlxflow.benchmarking.statistics import ratio_interval
from mlxflow.benchmarking.step_runner import Runner
from mlxflow.benchmarking.throughput import Timing, interleave
from mlxflow.benchmarking.time_budget import NOT_MEASURED, Budget
from mlxflow.device import phase_peaks
from mlxflow.device.memory_errors import out_of_memory_bytes, settle
from mlxflow.messages.byte_sizes import show_apart
from mlxflow.report.stage_reports.benchmark import DriftFigures
from mlxflow.report.stage_reports.benchmark_rows import TrainingRow

# Steps whose peaks are measured, for the highest: how far the host runs ahead varies by chance
_PEAK_STEPS = 8

# Recipes that are timed even if the time is over: the baseline and the workflow's
_FEWEST_RECIPES = 2

# The share of the remaining time, as a divisor, that measuring the peak of one recipe may take
_ADDING_SHARE = 20

#: The most rounds in which steps are timed.
ROUNDS = 20

#: Returns a runner of a recipe, on a model of its own.
Open = Callable[[Recipe], AbstractContextManager[Runner]]


class Measured(NamedTuple):
    """The measurement of one recipe.

    Attributes:
        recipe: how a step is done.
        timing: seconds per step in each round; None if there is an error.
        data_wait_share: share of the time spent waiting for batches.
        targets_per_step: mean number of targets.
        peak_memory_bytes: above the memory in use before its model was loaded; 0 if there is an error.
        compile_seconds: duration of the first step beyond that of the others.
        num_steps: timed steps.
        error: why there is no timing, in words.
        group: recipes of one group took turns with each other.
        machine: seconds of the fixed work of `machine_speed` in each round.
    """

    recipe: Recipe
    timing: Timing | None
    data_wait_share: float = 0.0
    targets_per_step: float = 0.0
    peak_memory_bytes: int = 0
    compile_seconds: float = 0.0
    num_steps: int = 0
    error: str = ""
    group: int = 0
    machine: Timing | None = None


class _DoesNotFitError(Exception):
    pass


class _Warm(NamedTuple):
    """A recipe that is loaded, compiled and ready to be timed."""

    recipe: Recipe
    runner: Runner
    first_seconds: float
    peak_bytes: int
    held_bytes: int


class _LoadedRecipes:
    """Recipes that are in memory together."""

    def __init__(self) -> None:
        self.members: list[_Warm] = []
        self._held = ExitStack()

    def add(self, recipe: Recipe, open_runner: Open, limit_bytes: int, budget: Budget) -> None:
        """Load a recipe, run its first steps and measure its memory.

        Raises:
            _DoesNotFitError: out of memory.
        """
        settle()
        mx.clear_cache()
        before = mx.get_active_memory()
        with ExitStack() as opening:
            try:
                runner = opening.enter_context(open_runner(recipe))
                begin = time.perf_counter()
                runner.run(1)  # compiles, and creates the optimizer's state
                first = time.perf_counter() - begin
                with phase_peaks.followed() as followed:
                    runner.run(_PEAK_STEPS if first * _PEAK_STEPS < budget.left / _ADDING_SHARE else 1)
            except RuntimeError as error:
                needed = out_of_memory_bytes(error)
                if needed is None:
                    raise
                settle(drops=True)
                raise _DoesNotFitError(_lacking(mx.get_active_memory() - before + needed, limit_bytes)) from None
            active, peak = mx.get_active_memory(), followed.bytes
            if peak > limit_bytes:
                raise _DoesNotFitError(_lacking(peak - before, limit_bytes))
            self.members.append(_Warm(recipe, runner, first, peak - before, active - before))
            self._held.push(opening.pop_all())

    def close(self) -> None:
        """Free the memory."""
        self._held.close()
        self.members.clear()
        gc.collect()
        mx.clear_cache()


def _lacking(needed: int, limit: int) -> str:
    lacking, allowed = show_apart(needed, limit)
    return f"does not fit: needs {lacking} and may use {allowed}"


def measure_recipes(
    recipes: Iterable[Recipe], open_runner: Open, *, num_steps: int, memory_limit_bytes: int, budget: Budget
) -> tuple[list[Measured], DriftFigures | None]:
    """Time recipes in turns, as many at once as the memory holds.

    Args:
        recipes: in the order of the result.
        open_runner: opens a runner of a recipe.
        num_steps: timed steps of each; warm-up and compilation are left out.
        memory_limit_bytes: MLX's memory limit; a recipe that needs more gets an error.
        budget: of time. Recipes that are not loaded when half of it is spent, and rounds after its end, are left out.

    Returns:
        the measurement of each recipe, and the drift of the first one.
    """
    rows: list[Measured] = []
    group, number, drift = _LoadedRecipes(), 0, None
    enough = budget.left / 2
    left_out: list[Measured] = []
    for recipe in recipes:
        if budget.left < enough and len(group.members) + len(rows) >= _FEWEST_RECIPES:
            left_out.append(Measured(recipe, None, error=_out_of_time(budget), group=number))
            continue
        try:
            _add(group, recipe, open_runner, memory_limit_bytes, budget)
            continue
        except _DoesNotFitError as error:
            reason = str(error)
        if group.members:  # it may fit alone
            timed, drift = _time(group, number, num_steps, drift, budget)
            rows += timed
            number += 1
            try:
                _add(group, recipe, open_runner, memory_limit_bytes, budget)
                continue
            except _DoesNotFitError as error:
                reason = str(error)
        rows.append(Measured(recipe, None, error=reason, group=number))
    timed, drift = _time(group, number, num_steps, drift, budget)
    return rows + timed + left_out, drift


def _out_of_time(budget: Budget) -> str:
    return f"{NOT_MEASURED}: max_seconds = {budget.seconds:g} did not suffice"


def _add(group: _LoadedRecipes, recipe: Recipe, open_runner: Open, limit_bytes: int, budget: Budget) -> None:
    try:
        group.add(recipe, open_runner, limit_bytes, budget)
    except _DoesNotFitError:
        gc.collect()
        mx.clear_cache()
        raise


def _time(
    group: _LoadedRecipes, number: int, num_steps: int, drift: DriftFigures | None, budget: Budget
) -> tuple[list[Measured], DriftFigures | None]:
    """Time the loaded recipes in turns, and free their memory."""
    members = list(group.members)
    if not members:
        return [], drift
    per_round = max(1, num_steps // ROUNDS)
    num_rounds = num_steps // per_round
    before = [(warm.runner.waited_seconds, warm.runner.targets) for warm in members]
    turns = [_turn(warm.runner, per_round) for warm in members]
    begin = time.perf_counter()

    def goes_on(done: int) -> bool:
        taken = time.perf_counter() - begin
        if done == 1:
            budget.announce(f"{len(turns)} ways of a training step, {num_rounds} rounds", taken * num_rounds)
        budget.progress("training steps, round", done, num_rounds, taken)
        return not budget.is_over

    *timings, machine = interleave([*turns, fixed_work()], num_rounds=num_rounds, goes_on=goes_on)
    num_rounds = len(machine.seconds)
    rows = []
    for warm, timing, (waited, targets) in zip(members, timings, before, strict=True):
        own = Timing(tuple(seconds / per_round for seconds in timing.seconds))
        rows.append(
            Measured(
                recipe=warm.recipe,
                timing=own,
                data_wait_share=(warm.runner.waited_seconds - waited) / sum(timing.seconds),
                targets_per_step=(warm.runner.targets - targets) / (num_rounds * per_round),
                peak_memory_bytes=warm.peak_bytes,
                compile_seconds=max(0.0, warm.first_seconds - own.median),
                num_steps=num_rounds * per_round,
                group=number,
                machine=machine,
            )
        )
    if drift is None:
        drift = _drift(rows[0], members[0].runner, per_round, num_rounds)
    members.clear()
    group.close()
    return rows, drift


def _turn(runner: Runner, num_steps: int) -> Callable[[], object]:
    return lambda: runner.run(num_steps)


def _drift(row: Measured, runner: Runner, per_round: int, num_rounds: int) -> DriftFigures:
    """Time a recipe again, alone; a change beyond the noise and of more than 5 % is noticed."""
    assert row.timing is not None  # noqa: S101 - what was timed has times
    (again,) = interleave([_turn(runner, per_round)], num_rounds=min(num_rounds, 5))
    later = Timing(tuple(seconds / per_round for seconds in again.seconds))
    ratio = later.median / row.timing.median
    noticed = not later.interval.overlaps(row.timing.interval) and abs(ratio - 1) > 0.05
    return DriftFigures(name=row.recipe.name, batch_size=row.recipe.batch_size, ratio=ratio, is_noticed=noticed)


# --- rows of the report


def rows_of(
    measured: Sequence[Measured],
    *,
    targets_per_row: Callable[[Recipe], float],
    tokens_per_row: Callable[[Recipe], float],
) -> tuple[TrainingRow, ...]:
    """Return the rows of a report.

    Args:
        measured: from `measure_recipes`.
        targets_per_row: returns the mean number of targets in a row of a recipe.
        tokens_per_row: returns the mean number of tokens in a row of a recipe, without padding.
    """
    workflows = {(one.recipe.batch_size, one.group): one for one in measured if one.recipe.name == "workflow"}
    rows = []
    for one in measured:
        recipe, timing = one.recipe, one.timing
        if timing is None:
            rows.append(TrainingRow(name=recipe.name, batch_size=recipe.batch_size, error=one.error))
            continue
        targets = recipe.rows_per_step * targets_per_row(recipe)
        row = _row(one, timing, targets=targets, tokens=recipe.rows_per_step * tokens_per_row(recipe))
        workflow = workflows.get((recipe.batch_size, one.group))
        if workflow is not None and workflow is not one and workflow.timing is not None:
            theirs = workflow.recipe.rows_per_step * targets_per_row(workflow.recipe)
            row = _against_workflow(row, timing, workflow.timing, targets_ratio=theirs / targets)
        rows.append(row)
    return tuple(rows)


def _row(measured: Measured, timing: Timing, *, targets: float, tokens: float) -> TrainingRow:
    """Return the row of a timed recipe.

    Args:
        measured: the measurement.
        timing: of its steps.
        targets: mean number in a step.
        tokens: mean number in a step, without padding.
    """
    step, machine = timing.interval, measured.machine
    rate = step.inverse(targets)
    relative = ratio_interval(timing.seconds, machine.seconds).inverse(targets) if machine else None
    return TrainingRow(
        name=measured.recipe.name,
        batch_size=measured.recipe.batch_size,
        num_steps=measured.num_steps,
        median_step_seconds=step.median,
        low_step_seconds=step.low,
        high_step_seconds=step.high,
        confidence=step.confidence,
        samples_per_second=measured.recipe.rows_per_step / step.median,
        tokens_per_second=rate.median,
        low_tokens_per_second=rate.low,
        high_tokens_per_second=rate.high,
        tokens_per_second_per_gb=rate.median / (measured.peak_memory_bytes / 1e9),
        peak_memory_bytes=measured.peak_memory_bytes,
        data_wait_share=measured.data_wait_share,
        compile_seconds=measured.compile_seconds,
        machine_seconds=machine.median if machine else None,
        low_relative_tokens_per_second=relative.low if relative else None,
        high_relative_tokens_per_second=relative.high if relative else None,
        processed_tokens_per_second=tokens / timing.median,
    )


_VERDICTS = {"more": "the workflow is faster", "less": "the workflow is slower", "noise": "noise"}


def _against_workflow(row: TrainingRow, timing: Timing, workflow: Timing, *, targets_ratio: float) -> TrainingRow:
    """Return a row with the workflow's speedup over it on the same number of targets, from paired rounds.

    Args:
        row: of another recipe.
        timing: of its steps.
        workflow: the steps of the workflow.
        targets_ratio: targets in a step of the workflow by those in a step of the row.
    """
    ratio = ratio_interval(timing.seconds, workflow.seconds).scaled(targets_ratio)
    return msgspec.structs.replace(
        row,
        workflow_speedup=ratio.median,
        low_workflow_speedup=ratio.low,
        high_workflow_speedup=ratio.high,
        verdict=_VERDICTS[ratio.verdict],
    )
