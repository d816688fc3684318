"""A baseline on a busy machine: unchanged code is not called worse, and a real regression is found all the same."""

import math
import random
import statistics
from collections.abc import Set
from typing import Any

import msgspec
import pytest

from mlxflow.benchmarking.baseline import REPETITIONS
from mlxflow.benchmarking.report_comparison import (
    Confirmation,
    RepeatedRows,
    compare_reports,
    confirm,
    regressions,
)
from mlxflow.benchmarking.statistics import median_interval, ratio_interval
from mlxflow.report.stage_reports.benchmark_rows import TrainingRow
from tests.benchmarking.report_rows import training_row

_NAMES = ("baseline", "workflow", "without compile", "without packing")
_ROUNDS = 20
_TRIALS = 200


class _Machine:
    """A machine whose speed drifts, which another program slows down now and then, and whose clock runs by its work.

    Args:
        seed: of its weather.
        drift: standard deviation of the logarithm of its speed, which changes within minutes.
        busy_share: of the time, in bursts of half a minute each on average that slow work down 1.2 to 2.5 times.
    """

    def __init__(self, seed: int, *, drift: float, busy_share: float) -> None:
        self._random = random.Random(seed)
        self._drift, self._busy_share = drift, busy_share
        self._level = self._random.gauss(0, drift)
        self._burst, self._burst_end, self._next_burst = 1.0, -1.0, self._wait()
        self._now = 0.0

    def _wait(self) -> float:
        return self._random.expovariate(1 / (30 * (1 / self._busy_share - 1))) if self._busy_share else math.inf

    def run(self, seconds: float, suffers: float) -> float:
        """Return what work takes that takes so long at rest, and suffers so much from what slows the machine."""
        decay = math.exp(-seconds / 120)
        self._level = decay * self._level + self._drift * math.sqrt(1 - decay**2) * self._random.gauss(0, 1)
        if self._now >= self._next_burst:
            self._burst, self._burst_end = self._random.uniform(1.2, 2.5), self._now + self._random.expovariate(1 / 30)
            self._next_burst = self._burst_end + self._wait()
        slowdown = math.exp(self._level) * (self._burst if self._now < self._burst_end else 1.0)
        taken: float = seconds * slowdown**suffers * math.exp(abs(self._random.gauss(0, 0.02)))
        self._now += taken
        return taken

    def rest(self, seconds: float) -> None:
        """Let time pass."""
        for _ in range(int(seconds)):
            self.run(1.0, 0.0)

    def measure(self, names: Set[str] | None = None, *, slower: float = 1.0) -> RepeatedRows:
        """Return a benchmark's rows; "workflow" takes so many times as long as it should."""
        chosen = [name for name in _NAMES if names is None or f"{name}, 8 rows" in names]
        taken: dict[str, list[float]] = {name: [] for name in chosen}
        fixed = []
        for _ in range(_ROUNDS):
            for place, name in enumerate(chosen):
                cost = 0.5 * (slower if name == "workflow" else 1.0)
                taken[name].append(self.run(cost, 0.8 + 0.1 * place))
            fixed.append(self.run(0.05, 1.0))
        return RepeatedRows(tuple(_row(name, seconds, fixed) for name, seconds in taken.items()), ())


def _row(name: str, seconds: list[float], machine: list[float]) -> TrainingRow:
    rate, relative = median_interval(seconds).inverse(100.0), ratio_interval(seconds, machine).inverse(100.0)
    return msgspec.structs.replace(
        training_row(rate.median, name=name),
        machine_seconds=statistics.median(machine),
        low_tokens_per_second=rate.low,
        high_tokens_per_second=rate.high,
        low_relative_tokens_per_second=relative.low,
        high_relative_tokens_per_second=relative.high,
    )


def _without_machine(rows: RepeatedRows) -> RepeatedRows:
    return RepeatedRows(tuple(msgspec.structs.replace(row, machine_seconds=None) for row in rows.training), ())


def _held_against_baseline(seed: int, *, drift: float, busy_share: float, slower: float) -> tuple[bool, Confirmation]:
    """Return whether a single run looks like a regression, and what becomes of it."""
    machine = _Machine(seed, drift=drift, busy_share=busy_share)
    machine.rest(60)
    before = machine.measure()
    machine.rest(600)
    suspects = regressions(compare_reports(before, machine.measure(slower=slower)), 0.05)
    found = confirm(
        before,
        suspects,
        lambda names: machine.measure(names, slower=slower),
        max_regression=0.05,
        most_repetitions=REPETITIONS,
    )
    return bool(suspects), found


def _share(*, slower: float, drift: float, busy_share: float) -> float:
    """Return how often a regression is called."""
    called = 0
    for seed in range(_TRIALS):
        _, found = _held_against_baseline(seed, drift=drift, busy_share=busy_share, slower=slower)
        called += any(one.what == "workflow, 8 rows" for one in found.worse) if slower > 1 else bool(found.worse)
    return called / _TRIALS


_WEATHER = [
    pytest.param({"drift": 0.0, "busy_share": 0.0}, id="a quiet machine"),
    pytest.param({"drift": 0.05, "busy_share": 0.0}, id="drift"),
    pytest.param({"drift": 0.05, "busy_share": 0.2}, id="drift and bursts"),
    pytest.param({"drift": 0.15, "busy_share": 0.4}, id="a busy machine"),
]


@pytest.mark.parametrize("weather", _WEATHER)
def test_unchanged_code_is_rarely_called_worse(weather: dict[str, float]) -> None:
    assert _share(slower=1.0, **weather) <= 0.01


@pytest.mark.parametrize(("weather", "least"), [*zip(_WEATHER, (1.0, 0.95, 0.65, 0.4), strict=True)])
def test_a_regression_of_20_percent_is_found(weather: Any, least: float) -> None:
    found = _share(slower=1.25, **weather.values[0])
    assert found >= least


def test_the_intervals_within_a_run_do_not_show_the_noise_between_runs() -> None:
    """What each test above measures would be called a regression by one run's intervals alone."""
    alarms = 0
    for seed in range(_TRIALS):
        machine = _Machine(seed, drift=0.15, busy_share=0.4)
        before = _without_machine(machine.measure())
        machine.rest(600)
        after = _without_machine(machine.measure())
        alarms += bool(regressions(compare_reports(before, after), 0.05))
    assert alarms / _TRIALS > 0.2
