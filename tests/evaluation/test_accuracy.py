"""Standard errors of accuracies, and intervals of paired differences."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from mlxflow.evaluation.accuracy import accuracy_of, paired_difference


def test_the_standard_error_is_that_of_the_sample() -> None:
    scores = [1.0, 0.0, 1.0, 1.0, 0.5]
    found = accuracy_of(scores)
    assert found.mean == pytest.approx(0.7)
    assert found.standard_error == pytest.approx(np.std(scores, ddof=1) / math.sqrt(5))
    assert accuracy_of([1.0]) == (1.0, 0.0)


def _pair(better: int, worse: int, same: int) -> tuple[list[float], list[float]]:
    scores = [1.0] * better + [0.0] * worse + [1.0] * same
    reference = [0.0] * better + [1.0] * worse + [1.0] * same
    return scores, reference


def _likelihood_ratio_free_statistic(better: int, worse: int, count: int, difference: float) -> float:
    """Return the score statistic with the constrained estimate found by search, not by Tango's formula."""
    shares = np.linspace(max(0.0, -difference), min(1.0, (1 - difference) / 2), 400_001)[1:-1]  # of `worse`
    with np.errstate(divide="ignore", invalid="ignore"):
        log = better * np.log(shares + difference) + worse * np.log(shares)
        log += (count - better - worse) * np.log(1 - 2 * shares - difference)
    share = shares[int(np.nanargmax(log))]
    variance = 2 * share + difference - difference**2
    return float((better - worse - count * difference) / math.sqrt(count * variance))


@pytest.mark.parametrize(("better", "worse", "same"), [(9, 4, 30), (1, 5, 14), (20, 20, 100), (3, 1, 2)])
def test_the_ends_of_the_interval_are_where_the_score_test_is_at_its_quantile(
    better: int, worse: int, same: int
) -> None:
    count = better + worse + same
    found = paired_difference(*_pair(better, worse, same), confidence=0.95)
    assert found.difference == pytest.approx((better - worse) / count)
    assert (found.better, found.worse) == (better, worse)
    assert found.low < found.difference < found.high
    quantile = NormalDist().inv_cdf(0.975)
    for end, sign in ((found.low, 1), (found.high, -1)):
        statistic = _likelihood_ratio_free_statistic(better, worse, count, end)
        assert statistic == pytest.approx(sign * quantile, abs=2e-3)


def test_equal_models_get_an_interval_with_a_width() -> None:
    found = paired_difference(*_pair(0, 0, 40), confidence=0.95)
    square = NormalDist().inv_cdf(0.975) ** 2
    assert found.high == pytest.approx(square / (40 + square))
    assert found.low == -found.high


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        one = (random.random(60) < 0.8).astype(float)
        other = np.where(random.random(60) < 0.25, (random.random(60) < 0.5), one).astype(float)
        found = paired_difference(other.tolist(), one.tolist(), confidence=0.9)
        truth = 0.25 * (0.5 - 0.8)
        hits += found.low <= truth <= found.high
    assert 0.86 <= hits / 400 <= 0.95


def test_scores_between_zero_and_one_get_the_normal_interval() -> None:
    found = paired_difference([0.5, 0.25, 1.0], [0.25, 0.5, 0.75], confidence=0.95)
    deltas = np.array([0.25, -0.25, 0.25])
    half = NormalDist().inv_cdf(0.975) * deltas.std(ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((deltas.mean() - half, deltas.mean() + half))
    assert (found.better, found.worse) == (2, 1)


def test_items_that_do_not_match_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 0.0], confidence=0.95)
