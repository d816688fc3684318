"""Loss over tokens and over seconds, of several runners in turns."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

from mlxflow.benchmarking.step_runner import Runner
from mlxflow.benchmarking.time_budget import Budget

# A run's points at most
_POINTS = 20


def converge(runners: Mapping[str, Runner], *, num_steps: int, budget: Budget) -> list[dict[str, Any]]:
    """Train each for some steps and return its curve; the seconds of a first step, which compiles, are left out.

    A point's loss is the mean over the steps since the point before it. Of the losses that every run reached, the
    lowest is `same_loss`; what each run needed for it stands beside it.

    Args:
        runners: on equal models that have learnt nothing, by name.
        num_steps: of each, or as many as there is time for.
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
    """Return curves with the tokens and seconds that each took to the lowest loss that all of them reached."""
    same = max(min(curve["loss"]) for curve in curves)
    return [curve | {"same_loss": same} | _at(curve, same) for curve in curves]


def _at(curve: Mapping[str, Any], loss: float) -> dict[str, Any]:
    place = next(place for place, value in enumerate(curve["loss"]) if value <= loss)
    return {"tokens_to_loss": curve["tokens"][place], "seconds_to_loss": curve["seconds"][place]}
