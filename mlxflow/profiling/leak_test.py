"""Statistical test for memory leaks, robust to warm-up, sawtooth, spikes, jumps, drift and caches that fill.

The test uses troughs only: what a program always holds is visible where it holds the least. The series is cut into
blocks, the lowest value of each block is a point, and lines are fitted to the points: a slope, a jump, a slope beside a
jump, and a growth that slows down. A leak is a slope that is significant under autocorrelated noise (AR(1)), that no
jump explains as well, and that is as steep late as early. `benchmarks/leaks.py` measures the error rates.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlxflow.report.stage_reports.profile import LeakFigures

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Numbers of points that are tried: few where the noise is slow, more where it is fast
_NUM_POINTS = (8, 12, 20, 30)
# Standard errors that a slope must exceed, by number of points: few points estimate their noise badly
_SLOPE_ERRORS = {8: 5.0, 12: 4.0, 20: 3.5, 30: 3.3}
_FEWEST_STEPS = 8
_STEEP_LATE = 0.7
_STEEP_LATE_LEAST = 0.2
_JUMP_IS_BETTER = 0.6
_CURVE_IS_BETTER = 0.7
# A jump is sharp if it exceeds this many median changes between steps; levels are medians over a window beside it
_JUMP_NOISES = 6.0
_WINDOW = 15
_BESIDE_CURVE_ERRORS = 3.0


class _Fit(NamedTuple):
    """A straight line through points.

    Attributes:
        slope: in bytes a step.
        error: standard error of the slope.
        residual: sum of squared residuals.
    """

    slope: float
    error: float
    residual: float


def find_leak(
    series: "Sequence[float] | NDArray[np.float64]",
    *,
    floor_bytes_per_step: float,
    floor_share: float,
    limit_bytes: int | None,
) -> LeakFigures:
    """Return whether a memory reading at every step's end shows a leak.

    Args:
        series: in bytes, one value for each step.
        floor_bytes_per_step: slower growth is ignored.
        floor_share: growth over the whole series by less than this share of its median is ignored.
        limit_bytes: the memory limit, or None.
    """
    values = np.asarray(series, np.float64)
    if len(values) < _FEWEST_STEPS:
        return LeakFigures(verdict="none", bytes_per_step=0.0)
    floor = max(floor_bytes_per_step, floor_share * float(np.median(values)) / len(values))
    settled = without_jumps(values[max(2, len(values) // 4) :])
    slope = max((_leak_slope(settled, points, floor) for points in _NUM_POINTS if len(settled) >= points), default=0.0)
    if len(settled) < min(_NUM_POINTS):
        slope = _leak_slope(settled, len(settled), floor)
    if slope > 0:
        left = None if limit_bytes is None else max(0, int((limit_bytes - values[-1]) / slope))
        return LeakFigures(verdict="leak", bytes_per_step=slope, steps_until_limit=left)
    return LeakFigures(verdict="bounded growth" if _has_grown(values, floor) else "none", bytes_per_step=0.0)


def _leak_slope(values: "NDArray[np.float64]", points: int, floor: float) -> float:
    """Return the slope of the troughs if it is that of a leak, else 0."""
    times, troughs = _troughs(values, points)
    line = _fit(times, troughs)
    if line.slope < floor or line.slope < _SLOPE_ERRORS.get(points, 7.0) * line.error:
        return 0.0
    jump = min(_jump_residual(troughs, at) for at in range(1, len(times)))
    if jump + _tiny(troughs) < _JUMP_IS_BETTER * line.residual:
        return 0.0
    if _slows_down(times, troughs, line):
        line = _fit(times, troughs, beside=_logarithm(times))  # a slope beside the growth that slows down
    is_clear = line.slope > floor and line.slope > _BESIDE_CURVE_ERRORS * line.error
    return line.slope if is_clear else 0.0


def without_jumps(values: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return a series without its sharp rises, and without the sharp falls that undo one of them.

    A buffer that is allocated once is no leak, nor is a second phase that needs more. A fall that undoes slow growth,
    as after garbage collection, stays: without it a sawtooth would look like a ramp.
    """
    jumps = _sharp_jumps(values)
    removed = np.zeros(len(values))
    rises = {at: size for at, size in jumps if size > 0}
    levels: list[float] = []
    unpaired: list[tuple[int, float]] = []
    for at, fall in ((at, size) for at, size in jumps if size < 0):
        undone = [other for other, rise in rises.items() if abs(rise + fall) < 0.3 * rise]
        if not undone:
            unpaired.append((at, fall))
            continue
        nearest = min(undone, key=lambda other: abs(other - at))
        levels.append((rises.pop(nearest) - fall) / 2)  # the same size for both, so that they cancel
        removed[nearest:] += levels[-1]
        removed[at:] -= levels[-1]
    for at, size in [*rises.items(), *unpaired]:
        level = min(levels, key=lambda level: abs(level - abs(size)), default=math.inf)
        if abs(level - abs(size)) < 0.3 * abs(size):
            removed[at:] += math.copysign(level, size)
        elif size > 0:
            removed[at:] += size
    return values - removed


def _sharp_jumps(values: "NDArray[np.float64]") -> list[tuple[int, float]]:
    """Return the steps at which the level changes far more than around them, and by how many bytes."""
    changes = np.diff(values)
    lag = min(_WINDOW, len(values) - 1)
    slope = float(np.median(values[lag:] - values[:-lag])) / lag  # the trend of the series
    jumps: list[tuple[int, float]] = []
    for at in np.flatnonzero(np.abs(changes) > _JUMP_NOISES * float(np.median(np.abs(changes)))) + 1:
        before, after = values[max(0, at - _WINDOW) : at], values[at : at + _WINDOW]
        if min(len(before), len(after)) < _WINDOW // 3:
            continue
        size = float(np.median(after) - np.median(before))
        noise = np.concatenate([np.diff(before), np.diff(after)])
        size -= slope * (len(before) + len(after)) / 2
        spread = float(np.abs(noise - slope).mean())
        step = float(changes[at - 1]) - slope
        if abs(size) > _JUMP_NOISES * spread and step * size > 0 and abs(step) > 0.5 * abs(size):
            jumps.append((int(at), size))
    return jumps


def _troughs(values: "NDArray[np.float64]", points: int) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    """Return the middle of each block, in steps, and its lowest value, in bytes."""
    blocks = np.array_split(np.arange(len(values)), points)
    return np.array([block.mean() for block in blocks]), np.array([values[block].min() for block in blocks])


def _tiny(values: "NDArray[np.float64]") -> float:
    """Return the sum of squared residuals that rounding alone causes."""
    return len(values) * (1e-9 * float(np.abs(values).max()) + 1.0) ** 2


def _fit(
    times: "NDArray[np.float64]", values: "NDArray[np.float64]", beside: "NDArray[np.float64] | None" = None
) -> _Fit:
    """Fit a line by least squares, optionally together with a multiple of another curve."""
    along = times - times.mean()
    left = values - values.mean()
    if beside is not None:  # project both on the complement of the curve
        curve = beside - beside.mean()
        curve /= math.sqrt(float(curve @ curve))
        along, left = along - (along @ curve) * curve, left - (left @ curve) * curve
    spread = float(along @ along)
    slope = float(along @ left) / spread
    left = left - slope * along
    residual = float(left @ left)
    variance = max(residual, _tiny(values)) / max(1, len(times) - 2 - (beside is not None))
    follows = float(left[1:] @ left[:-1]) / max(residual, _tiny(values))
    follows = min(0.9, max(0.0, follows + 1 / len(times)))  # corrects the bias of a short series
    return _Fit(slope, math.sqrt(variance / spread * (1 + follows) / (1 - follows)), residual)


def _logarithm(times: "NDArray[np.float64]") -> "NDArray[np.float64]":
    curve: NDArray[np.float64] = np.log(times + (times[-1] + times[0]) / 3)  # the first quarter was cut off
    return curve


def _jump_residual(values: "NDArray[np.float64]", at: int) -> float:
    """Return the sum of squared residuals of two levels with a jump between them."""
    return float(values[:at].var() * at + values[at:].var() * (len(values) - at))


def _slows_down(times: "NDArray[np.float64]", values: "NDArray[np.float64]", line: _Fit) -> bool:
    """Return whether the growth is less steep late than early, beyond the noise."""
    curve = _logarithm(times)
    slowing = _fit(curve, values)
    half = len(times) // 2
    early, late = _fit(times[:half], values[:half]), _fit(times[half:], values[half:])
    lacks = _STEEP_LATE * early.slope - late.slope
    is_clear = lacks > math.hypot(_STEEP_LATE * early.error, late.error)
    return (
        is_clear
        or late.slope <= _STEEP_LATE_LEAST * line.slope
        or (slowing.residual + _tiny(values) < _CURVE_IS_BETTER * line.residual)
    )


def _has_grown(values: "NDArray[np.float64]", floor: float) -> bool:
    """Return whether the troughs rose after the first steps and then stopped rising."""
    after = values[2:]
    _, troughs = _troughs(after, min(12, len(after)))
    third = max(1, len(troughs) // 3)
    begin, end = float(troughs[0]), troughs[-third:]
    noise = float(np.abs(np.diff(end)).mean()) if third > 1 else 0.0
    return bool(float(np.median(end)) - begin > floor * len(values) + 4 * noise)
