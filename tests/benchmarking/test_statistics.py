import random
import statistics

import pytest

from mlxflow.benchmarking.statistics import median_interval, ratio_interval


@pytest.mark.parametrize("count", [6, 7, 10, 20, 25, 100])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_has_the_requested_confidence_and_is_the_narrowest(count: int, confidence: float) -> None:
    samples = list(range(count))
    found = median_interval(samples, confidence=confidence)
    assert found.confidence >= confidence
    place = samples.index(int(found.low))
    assert found.high == count - 1 - place  # as far from either end
    narrower = median_interval(samples, confidence=found.confidence + 1e-9)
    assert narrower.low < found.low or found.low == 0


@pytest.mark.parametrize("count", [6, 9, 20, 41])
def test_the_interval_matches_scipy(count: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs the interop extra: pip install -e '.[test,interop]'")
    random.seed(count)
    samples = [random.lognormvariate(0, 1) for _ in range(count)]
    theirs = stats.quantile_test(samples, q=0, p=0.5).confidence_interval(confidence_level=0.95)
    ours = median_interval(samples, confidence=0.95)
    assert (ours.low, ours.high) == (theirs.low, theirs.high)
    assert ours.median == statistics.median(samples)
    place = sorted(samples).index(ours.low)
    assert ours.confidence == pytest.approx(1 - 2 * stats.binom.cdf(place, count, 0.5))


def test_the_interval_covers_the_true_median_at_its_confidence() -> None:
    random.seed(1)
    intervals = [median_interval([random.expovariate(1) for _ in range(20)], confidence=0.95) for _ in range(2000)]
    share = statistics.fmean(one.low <= 0.693147 <= one.high for one in intervals)
    assert share == pytest.approx(intervals[0].confidence, abs=0.015)


def test_few_samples_give_their_range_with_its_confidence() -> None:
    found = median_interval([3.0, 1.0, 2.0, 5.0, 4.0], confidence=0.95)
    assert found == (3.0, 1.0, 5.0, 1 - 2 / 32)
    assert median_interval([7.0]) == (7.0, 7.0, 7.0, 0.0)


def test_a_ratio_of_pairs_cancels_shared_drift() -> None:
    drift = [1.0, 1.5, 2.0, 3.0, 2.5, 1.2, 4.0, 1.1]
    found = ratio_interval([1.3 * one for one in drift], drift)
    assert (found.low, found.high) == pytest.approx((1.3, 1.3))
    assert found.verdict == "more"


@pytest.mark.parametrize(("ratios", "verdict"), [([0.9, 1.1] * 5, "noise"), ([0.8, 0.9] * 5, "less")])
def test_a_ratio_around_one_is_noise(ratios: list[float], verdict: str) -> None:
    assert ratio_interval(ratios, [1.0] * 10).verdict == verdict


def test_the_interval_of_a_rate_is_the_inverse_of_that_of_the_times() -> None:
    times = median_interval([1.0, 2.0, 4.0])
    assert times.inverse(8.0)[:3] == (4.0, 2.0, 8.0)
    assert times.overlaps(median_interval([4.0, 5.0]))
    assert not times.overlaps(median_interval([4.5, 5.0]))
