"""Confidence intervals of medians and of ratios, from repeated measurements.

Times have a lower bound and a long tail, so they are summarized by the median and an interval of order statistics,
which assumes nothing about their distribution (Conover, Practical Nonparametric Statistics, 1999, 3.2).
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

#: A ratio compared with 1 by its interval; "noise" if the interval contains 1.
Verdict = Literal["more", "less", "noise"]


class Interval(NamedTuple):
    """A median with its confidence interval.

    Attributes:
        median: of the samples.
        low: lower end of the interval.
        high: upper end.
        confidence: share of such intervals that contain the true median; less than requested if there are too few
            samples.
    """

    median: float
    low: float
    high: float
    confidence: float

    def overlaps(self, other: "Interval") -> bool:
        """Return whether the intervals have a value in common."""
        return self.low <= other.high and other.low <= self.high

    def inverse(self, numerator: float) -> "Interval":
        """Return the interval of a number divided by the samples, which are positive."""
        return Interval(numerator / self.median, numerator / self.high, numerator / self.low, self.confidence)

    def scaled(self, factor: float) -> "Interval":
        """Return the interval of the samples times a positive number."""
        return Interval(self.median * factor, self.low * factor, self.high * factor, self.confidence)

    @property
    def verdict(self) -> Verdict:
        """The ratio compared with 1."""
        if self.low > 1:
            return "more"
        return "less" if self.high < 1 else "noise"


def median_interval(samples: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the median and the shortest symmetric interval of order statistics with the requested confidence.

    With fewer than six samples the interval is from the least to the greatest, with a lower confidence.

    Args:
        samples: independent; at least one.
        confidence: between 0 and 1.
    """
    ordered = sorted(samples)
    count = len(ordered)
    place = 0
    while place + 1 < (count + 1) // 2 and _coverage(place + 1, count) >= confidence:
        place += 1
    return Interval(statistics.median(ordered), ordered[place], ordered[count - 1 - place], _coverage(place, count))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the interval of the ratio of two measurements that were taken in pairs.

    Args:
        numerators: positive samples.
        denominators: as many positive samples, paired with the numerators by place.
        confidence: between 0 and 1.
    """
    ratios = [one / other for one, other in zip(numerators, denominators, strict=True)]
    return median_interval(ratios, confidence=confidence)


def _coverage(place: int, count: int) -> float:
    """Return the probability that the median lies between the order statistics `place` places from either end."""
    outside = sum(math.comb(count, below) for below in range(place + 1))
    return max(0.0, 1 - outside / 2.0 ** (count - 1))
