"""Loss curves over tokens and seconds of several recipes, trained in turns."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

from mlxflow.benchmarking.step_runner import Runner
from mlxflow.benchmarking.time_budget import Budget

# The most points of a curve
_POINTS = 20


def converge(runners: Mapping[str, Runner], *, num_steps: int, budget: Budget) -> list[dict[str, Any]]:
    """Train each runner and return its loss curve; the seconds exclude the first step, which compiles.

    The loss of a point is the mean since the previous point. `same_loss` is the lowest loss that every run reached;
    `tokens_to_loss` and `seconds_to_loss` are what a run needed to reach it.

    Args:
        runners: on equal untrained models, by name.
        num_steps: of each, or as many as the time allows.
        budget: of time.
    """
    each = max(1, num_steps // _POINTS)
    curves: dict[str, dict[str, Any]] = {
        name: {"name": name, "steps": [], "tokens": [], "seconds": [], "loss": []} for name in runners
    }
    done, taken = 0, dict.fromkeys(runners, 0.0)
    begun = time.perf_counter()
    while done < num_steps and not (budget.is_over and done > 1):
        count = 1 if done == 0 else min(each, num_steps - done)
        for name, runner in runners.items():
            begin = time.perf_counter()
            losses = runner.run(count)
            if done:
                taken[name] += time.perf_counter() - begin
            curve = curves[name]
            curve["steps"].append(done + count)
            curve["tokens"].append(runner.targets)
            curve["seconds"].append(taken[name])
            curve["loss"].append(statistics.fmean(losses))
        done += count
        if done == 1 + each:
            budget.announce(f"convergence, {num_steps} steps", (num_steps - 1) * sum(taken.values()) / each)
        budget.progress("convergence, step", done, num_steps, time.perf_counter() - begun)
    return with_same_loss(list(curves.values()))


def with_same_loss(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return curves with the tokens and seconds that each needed to reach the lowest loss that all reached."""
    same = max(min(curve["loss"]) for curve in curves)
    return [curve | {"same_loss": same} | _at(curve, same) for curve in curves]


def _at(curve: Mapping[str, Any], loss: float) -> dict[str, Any]:
    place = next(place for place, value in enumerate(curve["loss"]) if value <= loss)
    return {"tokens_to_loss": curve["tokens"][place], "seconds_to_loss": curve["seconds"][place]}
