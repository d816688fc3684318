"""Building blocks of plots: escaped SVG elements, scales, ticks, and downsampling that keeps peaks."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup, escape

from mlxflow.report.formatting import clean

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Number of buckets for downsampling; each contributes its smallest and its largest value.
BUCKETS = 360

# The largest ends of an axis: an untrusted report may contain any number, and a margin is added to it
_LARGEST = 1e150


def tag(name: str, attributes: Mapping[str, object] | None = None, *children: str) -> Markup:
    """Return an element; text is escaped, markup is unchanged.

    Args:
        name: of the element.
        attributes: None omits an attribute; numbers are rounded to hundredths.
        children: text or markup.
    """
    written = Markup("")
    for key, value in (attributes or {}).items():
        if value is not None:
            shown = trim(value) if isinstance(value, float) else clean(str(value))
            written += Markup(' {}="{}"').format(key, shown)
    inner = Markup("").join(child if isinstance(child, Markup) else escape(clean(child)) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inner)  # noqa: S704 - our own names


def trim(value: float) -> str:
    """Return a coordinate in as few characters as possible."""
    shown = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if shown in ("-0", "") else shown


class Scale(NamedTuple):
    """Maps values between two ends to 0 to 1, linearly or logarithmically."""

    low: float
    high: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value, clamped to the ends."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5

    def ticks(self, count: int) -> list[float]:
        """Return about the requested number of round values between the ends."""
        return _log_ticks(self.low, self.high, count) if self.logarithmic else _even_ticks(self.low, self.high, count)


def scale_of(values: Sequence[float], *, logarithmic: bool = False, from_zero: bool = False) -> Scale:
    """Return a scale that contains all values, with a small margin.

    Args:
        values: finite; not empty.
        logarithmic: use a logarithmic scale if every value is positive.
        from_zero: whether the low end is zero.
    """
    low, high = (min(_LARGEST, max(-_LARGEST, end)) for end in (min(values), max(values)))
    if logarithmic and low > 0:
        low, high = max(low, 1 / _LARGEST), max(high, 1 / _LARGEST)
        if high / low < 2:
            low, high = low / 1.5, high * 1.5
        return Scale(low / (high / low) ** 0.04, high * (high / low) ** 0.04, True)
    low = min(0.0, low) if from_zero else low
    if 0 < high - low < 0.002 * abs(high):  # values within a thousandth of each other look equal
        low, high = low - 0.001 * abs(high), high + 0.001 * abs(high)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(low if from_zero and low == 0 else low - room, high + room)


def _even_ticks(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / max(1, count)
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, count: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(ticks) <= count + 2:
            return ticks if len(ticks) > 1 else _even_ticks(low, high, count)
    every = math.ceil(len(ticks) / max(1, count))
    return ticks[::every]


def thin(x: "NDArray[Any]", y: "NDArray[Any]", buckets: int = BUCKETS) -> "tuple[NDArray[Any], NDArray[Any]]":
    """Downsample a series to at most two points per bucket, the smallest and the largest, and both ends.

    Args:
        x: (N,) ascending.
        y: (N,); points that are not finite are left out.
        buckets: number of buckets, of equal numbers of points.
    """
    import numpy as np

    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= 2 * buckets:
        return x, y
    edges = np.linspace(0, len(x), buckets + 1).astype(np.int64)
    indices = {0, len(x) - 1}
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        indices |= {begin + int(np.argmin(y[begin:end])), begin + int(np.argmax(y[begin:end]))}
    chosen: NDArray[np.int64] = np.array(sorted(indices))
    return x[chosen], y[chosen]


def path_of(
    x: Sequence[float], y: Sequence[float], across: Scale, up: Scale,
    width: float, height: float,
) -> str:  # fmt: skip
    """Return the path through points; y points upwards."""
    points = [(across(a) * width, (1 - up(b)) * height) for a, b in zip(x, y, strict=True)]
    return "M" + "L".join(f"{trim(round(a, 1))} {trim(round(b, 1))}" for a, b in points) if points else ""
