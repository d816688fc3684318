from collections.abc import Callable

import pytest

from mlxflow.training.memory_threshold import MemoryThreshold, first_threshold

LIMIT = 1_000_000


def _peaks(
    peak_of: Callable[[int], int], *, active: int = 100_000, count: int = 60
) -> tuple[MemoryThreshold, list[int]]:
    """Return a threshold that learned from peaks, and the peaks."""
    threshold, peaks = MemoryThreshold(LIMIT), []
    for _ in range(count):
        peaks.append(peak_of(threshold.bytes))
        threshold.learn(peaks[-1], active)
    return threshold, peaks


@pytest.mark.parametrize("slope", [0.5, 1.0])
@pytest.mark.parametrize("above", [0.08, 0.12])
def test_peaks_grow_to_98_percent_of_the_limit_and_never_exceed_it(slope: float, above: float) -> None:
    first = first_threshold(LIMIT)
    _, peaks = _peaks(lambda threshold: int(first + above * LIMIT + slope * (threshold - first)))
    assert max(peaks) == peaks[-1] <= 0.98 * LIMIT
    assert peaks[-1] >= 0.96 * LIMIT


def test_a_peak_above_the_limit_lowers_the_threshold_at_once_and_for_good() -> None:
    threshold, peaks = _peaks(lambda threshold: threshold + 250_000)
    assert peaks[0] > LIMIT
    assert all(peak <= LIMIT for peak in peaks[1:])
    assert threshold.bytes >= 700_000


def test_a_threshold_that_the_host_does_not_reach_stays() -> None:
    threshold, _ = _peaks(lambda _: 840_000)
    assert threshold.bytes == first_threshold(LIMIT)


def test_where_no_threshold_keeps_the_limit_it_is_the_limit() -> None:
    threshold, peaks = _peaks(lambda threshold: max(threshold, LIMIT) + 50_000)
    assert threshold.bytes == LIMIT
    assert len(peaks) > 10  # and it learns no more


def test_a_single_low_peak_does_not_let_it_rise() -> None:
    """An update may be measured in part."""
    threshold = MemoryThreshold(LIMIT)
    for peak in (860_000, 970_000):
        threshold.learn(peak, 100_000)
    assert threshold.bytes == first_threshold(LIMIT) + 5_000


def test_the_careful_threshold_does_not_rise_with_what_was_learned() -> None:
    first = first_threshold(LIMIT)
    threshold, _ = _peaks(lambda threshold: threshold + 20_000)
    assert threshold.bytes > first
    assert threshold.careful_bytes == first
    threshold.learn(LIMIT + 400_000, 100_000)
    assert threshold.careful_bytes == threshold.bytes < first


def test_a_reading_without_work_counts_for_nothing() -> None:
    threshold = MemoryThreshold(LIMIT)
    for peak, active in ((960_000, 100_000), (900_000, 900_000)) * 3:
        threshold.learn(peak, active)
    assert threshold.bytes == pytest.approx(first_threshold(LIMIT) + 10_000 + 10_000, abs=20_001)
