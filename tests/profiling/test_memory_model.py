from collections.abc import Callable

import pytest

from mlxflow.profiling.memory_model import Law, Point, fit_law, held_chunk, measure_points, shapes_to_measure
from mlxflow.profiling.step_memory import Peaks, ProfiledModel
from tests.profiling.test_step_memory import SETTINGS


@pytest.mark.matrix
def test_a_fitted_memory_model_predicts_peaks_within_10_percent(job: ProfiledModel) -> None:
    chunk = held_chunk(job, SETTINGS)
    *points, judge = measure_points(job, SETTINGS, shapes_to_measure(16, 32, chunk=chunk))
    law = fit_law(points, chunk=chunk)
    others = measure_points(job, SETTINGS, [(32, 32), (8, 128)])
    for size, length, peaks in [judge, *others]:
        assert law.peak_bytes(size, length) == pytest.approx(peaks.whole, rel=0.1)
    most = law.largest_batch_size(32, round(law.peak_bytes(40, 32)) + 1)
    assert most == 40
    assert law.largest_batch_size(32, 10) == 0


def _points(peak: Callable[[int, int], float], shapes: list[tuple[int, int]], update: float = 0.0) -> list[Point]:
    return [Point(rows, length, Peaks(peak(rows, length), update)) for rows, length in shapes]


SHAPES = [(1, 8), (2, 8), (4, 16), (2, 32), (8, 16)]


def test_fit_law_recovers_the_coefficients_of_exact_points() -> None:
    law = fit_law(_points(lambda b, n: 5e6 + 300 * b * n + 7 * b * n * n, SHAPES), chunk=0)
    assert law.weights == pytest.approx((5e6, 300, 7), rel=1e-6)
    assert law.peak_bytes(16, 64) == pytest.approx(5e6 + 300 * 1024 + 7 * 1024 * 64, rel=1e-6)


def test_coefficients_are_never_negative() -> None:
    law = fit_law(_points(lambda b, n: 1e6 - 10 * b * n + 3 * b * n * n, SHAPES), chunk=0)
    assert min(law.weights) >= 0


def test_the_update_bounds_the_peak_from_below() -> None:
    law = fit_law(_points(lambda b, n: 100.0 * b * n, SHAPES, update=1e9), chunk=0)
    assert law.peak_bytes(2, 8) == 1e9


def test_a_law_with_chunks_has_coefficients_for_each_side_of_the_chunk() -> None:
    small, large = [(1, 8), (2, 8), (4, 8)], [(16, 8), (32, 8), (64, 8)]
    points = _points(lambda b, n: 100.0 * b * n, small) + _points(lambda b, n: 1e6 + 10.0 * b * n, large)
    law = fit_law(points, chunk=64)
    assert law.peak_bytes(8, 8) == pytest.approx(6400, rel=1e-6)
    assert law.peak_bytes(128, 8) == pytest.approx(1e6 + 10240, rel=1e-6)


def test_largest_batch_size_is_the_last_that_fits() -> None:
    law = Law((100.0, 10.0, 0.0), (100.0, 10.0, 0.0), 0.0, 0)
    assert law.largest_batch_size(8, 100 + 80 * 7) == 7
    assert law.largest_batch_size(8, 100 + 80 * 8 - 1) == 7
    assert law.largest_batch_size(8, 100) == 0


@pytest.mark.parametrize(("chunk", "count"), [(0, 6), (64, 9)])
def test_shapes_to_measure_cover_both_sides_of_the_chunk(chunk: int, count: int) -> None:
    shapes = shapes_to_measure(16, 32, chunk=chunk)
    assert len(shapes) == count
    if chunk:
        assert all(rows * length >= 2 * chunk for rows, length in shapes[5:])
    else:
        assert max(rows * length for rows, length in shapes) < 16 * 32
