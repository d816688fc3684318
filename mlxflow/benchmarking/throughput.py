"""Time functions in turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlxflow.benchmarking.statistics import Interval, median_interval


class Timing(NamedTuple):
    """The seconds of repeated steps, without warm-up."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """The minimum, in seconds."""
        return min(self.seconds)

    @property
    def slowest(self) -> float:
        """The maximum, in seconds."""
        return max(self.seconds)

    @property
    def interval(self) -> Interval:
        """The median with its confidence interval, in seconds."""
        return median_interval(self.seconds)


#: Rounds that are run even if the time is over.
FEWEST_ROUNDS = 3


def interleave(
    steps: Sequence[Callable[[], object]], *, num_rounds: int, goes_on: Callable[[int], bool] = lambda done: True
) -> list[Timing]:
    """Time several steps in turns, so that drift of the machine affects them equally.

    Args:
        steps: functions to time.
        num_rounds: runs of each.
        goes_on: called after each round with the number of rounds done; False ends the measurement, after
            `FEWEST_ROUNDS` at the earliest.
    """
    rounds: list[list[float]] = []
    while len(rounds) < num_rounds:
        rounds.append([time_once(step) for step in steps])
        if not goes_on(len(rounds)) and len(rounds) >= FEWEST_ROUNDS:
            break
    return [Timing(column) for column in zip(*rounds, strict=True)]


def time_once(step: Callable[[], object]) -> float:
    """Run a step and return its duration in seconds."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
