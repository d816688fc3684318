"""Accuracy with its standard error, and the difference of two models' accuracies on the same items with an interval."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

# Halvings of the interval in which an end is searched for
_HALVINGS = 60


class Accuracy(NamedTuple):
    """The mean score of items, and its standard error: sample standard deviation by the square root of the number."""

    mean: float
    standard_error: float


class PairedDifference(NamedTuple):
    """The accuracy of a model minus that of a reference on the same items.

    Attributes:
        difference: of the means.
        low: lower end of its confidence interval.
        high: upper end.
        better: items on which the model scores higher.
        worse: items on which it scores lower.
    """

    difference: float
    low: float
    high: float
    better: int
    worse: int


def accuracy_of(scores: Sequence[float]) -> Accuracy:
    """Return the accuracy of at least one score."""
    count = len(scores)
    mean = math.fsum(scores) / count
    variance = math.fsum((score - mean) ** 2 for score in scores) / max(1, count - 1)
    return Accuracy(mean, math.sqrt(variance / count))


def paired_difference(scores: Sequence[float], reference: Sequence[float], *, confidence: float) -> PairedDifference:
    """Compare two models item by item.

    Scores of 0 and 1 get Tango's score interval for paired proportions (Statistics in Medicine 17, 1998, 891-908),
    which holds for few items and has a width even if no item differs; other scores get the normal approximation.

    Args:
        scores: of the model, at least one.
        reference: of the reference, item by item.
        confidence: share of such intervals that contain the true difference, between 0 and 1.
    """
    pairs = list(zip(scores, reference, strict=True))
    better = sum(one > other for one, other in pairs)
    worse = sum(one < other for one, other in pairs)
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    if all(score in (0.0, 1.0) for pair in pairs for score in pair):
        low, high = _tango(better, worse, len(pairs), quantile)
        return PairedDifference((better - worse) / len(pairs), low, high, better, worse)
    mean, error = accuracy_of([one - other for one, other in pairs])
    return PairedDifference(mean, mean - quantile * error, mean + quantile * error, better, worse)


def _tango(better: int, worse: int, count: int, quantile: float) -> tuple[float, float]:
    """Return the ends of Tango's interval: the differences whose score statistic is plus or minus a quantile."""
    difference = (better - worse) / count

    def search(outside: float, bound: float) -> float:
        inside = difference
        for _ in range(_HALVINGS):
            middle = (inside + outside) / 2
            if abs(_score_statistic(better, worse, count, middle)) <= bound:
                inside = middle
            else:
                outside = middle
        return inside

    return search(-1.0, quantile), search(1.0, quantile)


def _score_statistic(better: int, worse: int, count: int, difference: float) -> float:
    """Return the standardized deviation of the observed from an assumed difference (Tango 1998, equation 3)."""
    # the constrained maximum-likelihood estimate of the share of items that only the reference gets right
    square = 2 * count
    linear = -better - worse + (2 * count - better + worse) * difference
    constant = -worse * difference * (1 - difference)
    share = (math.sqrt(max(0.0, linear * linear - 4 * square * constant)) - linear) / (2 * square)
    variance = count * (2 * share + difference * (1 - difference))
    deviation = better - worse - count * difference
    if variance <= 0:
        return 0.0 if not deviation else math.copysign(math.inf, deviation)
    return deviation / math.sqrt(variance)
