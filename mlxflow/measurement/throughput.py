"""How fast steps run."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlxflow.measurement.statistics import Interval, median_interval


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


def interleave(steps: Sequence[Callable[[], object]], *, num_rounds: int) -> list[Timing]:
    """Time several steps in turns, so that a machine whose speed drifts treats them alike."""
    rounds = [[_time(step) for step in steps] for _ in range(num_rounds)]
    return [Timing(column) for column in zip(*rounds, strict=True)]


def _time(step: Callable[[], object]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
