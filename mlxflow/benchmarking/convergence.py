"""Loss curves over tokens and seconds of several recipes, trained in turns."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from mlxflow.benchmarking.step_runner import Runner
from mlxflow.benchmarking.time_budget import Budget
from mlxflow.report.stage_reports.benchmark import ConvergenceCurve

# The most points of a curve
_POINTS = 20


class LossPoint(NamedTuple):
    """A point of a loss curve; see `ConvergenceCurve`."""

    step: int
    tokens: int
    seconds: float
    loss: float


def converge(runners: Mapping[str, Runner], *, num_steps: int, budget: Budget) -> tuple[ConvergenceCurve, ...]:
    """Train each runner and return its loss curve; the seconds exclude the first step, which compiles.

    The loss of a point is the mean since the previous point. `same_loss` is the lowest loss that every run reached;
    `tokens_to_loss` and `seconds_to_loss` are what a run needed to reach it.

    Args:
        runners: on equal untrained models, by name.
        num_steps: of each, or as many as the time allows.
        budget: of time.
    """
    each = max(1, num_steps // _POINTS)
    points: dict[str, list[LossPoint]] = {name: [] for name in runners}
    done, taken = 0, dict.fromkeys(runners, 0.0)
    begun = time.perf_counter()
    while done < num_steps and not (budget.is_over and done > 1):
        count = 1 if done == 0 else min(each, num_steps - done)
        for name, runner in runners.items():
            begin = time.perf_counter()
            losses = runner.run(count)
            if done:
                taken[name] += time.perf_counter() - begin
            points[name].append(LossPoint(done + count, runner.targets, taken[name], statistics.fmean(losses)))
        done += count
        if done == 1 + each:
            budget.announce(f"convergence, {num_steps} steps", (num_steps - 1) * sum(taken.values()) / each)
        budget.progress("convergence, step", done, num_steps, time.perf_counter() - begun)
    for name, curve in points.items():
        if not all(_is_finite(point) for point in curve):
            budget.note(f"convergence: the loss of {name} did not stay finite; its curve ends before")
    return curves_of(points)


def curves_of(points: Mapping[str, Sequence[LossPoint]]) -> tuple[ConvergenceCurve, ...]:
    """Return curves with the tokens and seconds that each needed to reach the lowest loss that all reached.

    A curve ends before its first loss that is not finite; without a finite one there is no curve.

    Args:
        points: of each curve, by its name.
    """
    finite = {name: tuple(takewhile(_is_finite, curve)) for name, curve in points.items()}
    same = max((min(point.loss for point in curve) for curve in finite.values() if curve), default=0.0)
    return tuple(_curve(name, curve, same) for name, curve in finite.items() if curve)


def _is_finite(point: LossPoint) -> bool:
    return math.isfinite(point.loss)


def _curve(name: str, points: Sequence[LossPoint], same_loss: float) -> ConvergenceCurve:
    reached = next(point for point in points if point.loss <= same_loss)
    return ConvergenceCurve(
        name=name,
        steps=tuple(point.step for point in points),
        tokens=tuple(point.tokens for point in points),
        seconds=tuple(point.seconds for point in points),
        loss=tuple(point.loss for point in points),
        same_loss=same_loss,
        tokens_to_loss=reached.tokens,
        seconds_to_loss=reached.seconds,
    )
