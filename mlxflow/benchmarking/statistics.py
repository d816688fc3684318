"""What repeated measurements say, and what they do not.

Times have a lower bound and a long tail, so the middle one stands for them, with the interval that its order statistics
give: no assumption is made about how times are distributed (Conover, Practical Nonparametric Statistics, 1999, 3.2).
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

#: What a ratio's interval says of it: an interval around 1 says nothing.
Verdict = Literal["more", "less", "noise"]


class Interval(NamedTuple):
    """A median and what it may be.

    Attributes:
        median: of the samples.
        low: the end of the interval below it.
        high: the end above it.
        confidence: the share of such intervals that hold the true median; less than was asked for where the samples
            are too few for it.
    """

    median: float
    low: float
    high: float
    confidence: float

    def overlaps(self, other: "Interval") -> bool:
        """Return whether some value lies in both."""
        return self.low <= other.high and other.low <= self.high

    def inverse(self, numerator: float) -> "Interval":
        """Return the interval of a number divided by the samples, which are positive."""
        return Interval(numerator / self.median, numerator / self.high, numerator / self.low, self.confidence)

    def scaled(self, factor: float) -> "Interval":
        """Return the interval of the samples times a positive number."""
        return Interval(self.median * factor, self.low * factor, self.high * factor, self.confidence)

    @property
    def verdict(self) -> Verdict:
        """What a ratio is against 1."""
        if self.low > 1:
            return "more"
        return "less" if self.high < 1 else "noise"


def median_interval(samples: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the median and the shortest symmetric interval of order statistics that is as sure as asked for.

    Fewer than six samples give the least and the greatest, and the confidence that they have.

    Args:
        samples: independent of one another; at least one.
        confidence: between 0 and 1.
    """
    ordered = sorted(samples)
    count = len(ordered)
    place = 0
    while place + 1 < (count + 1) // 2 and _coverage(place + 1, count) >= confidence:
        place += 1
    return Interval(statistics.median(ordered), ordered[place], ordered[count - 1 - place], _coverage(place, count))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the interval of the ratio of two measurements taken in pairs, one after the other.

    Args:
        numerators: samples, positive.
        denominators: as many, each taken together with the numerator at its place.
        confidence: between 0 and 1.
    """
    ratios = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return median_interval(ratios, confidence=confidence)


def _coverage(place: int, count: int) -> float:
    """Return how often the median lies between the order statistics so many places from either end."""
    outside = sum(math.comb(count, below) for below in range(place + 1))
    return max(0.0, 1 - outside / 2.0 ** (count - 1))
