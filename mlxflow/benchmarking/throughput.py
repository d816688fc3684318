"""How fast steps run."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlxflow.benchmarking.statistics import Interval, median_interval


class Timing(NamedTuple):
    """The seconds of repeated steps, the first ones left out."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one, in seconds."""
        return statistics.median(self.seconds)

    @property
    def fastest(self) -> float:
        """In seconds."""
        return min(self.seconds)

    @property
    def slowest(self) -> float:
        """In seconds."""
        return max(self.seconds)

    @property
    def interval(self) -> Interval:
        """The middle one and what it may be, in seconds."""
        return median_interval(self.seconds)


#: Rounds that are taken though the time is over.
FEWEST_ROUNDS = 3


def interleave(
    steps: Sequence[Callable[[], object]], *, num_rounds: int, goes_on: Callable[[int], bool] = lambda done: True
) -> list[Timing]:
    """Time several steps in turns, so that a machine whose speed drifts treats them alike.

    Args:
        steps: what is timed.
        num_rounds: turns of each.
        goes_on: asked after each round with how many are done; False ends it, after `FEWEST_ROUNDS` at the earliest.
    """
    rounds: list[list[float]] = []
    while len(rounds) < num_rounds:
        rounds.append([time_once(step) for step in steps])
        if not goes_on(len(rounds)) and len(rounds) >= FEWEST_ROUNDS:
            break
    return [Timing(column) for column in zip(*rounds, strict=True)]


def time_once(step: Callable[[], object]) -> float:
    """Return the seconds that a step takes."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
