"""Charts as inline SVG: bars with intervals, stacked shares, spans of lengths, differences; the styles of all plots.

Only the data area is stretched to the width of the page: a plot is an SVG of 1,000 units without a fixed aspect
ratio, and axes and text are HTML beside it, so text keeps its size on a phone, on a wide screen and on paper.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from mlxflow.report import formatting, svg
from mlxflow.report.svg import tag

#: Number formats by name; the page's script has the same names.
FORMATS: dict[str, Callable[[Any], str]] = {
    "number": formatting.show,
    "bytes": formatting.show_bytes,
    "seconds": formatting.show_seconds,
    "percent": formatting.show_percent,
}

# Ticks this near to an end of their axis have words that begin or end at them
_EDGE = 0.06


def round_tick(tick: float) -> float:
    """Return a tick without rounding error."""
    return float(f"{tick:.9g}")


def anchor_of(place: float) -> str:
    """Return how the word of a tick is anchored so that it stays within its axis; a place is from 0 to 1."""
    return "start" if place < _EDGE else "end" if place > 1 - _EDGE else "middle"


def _tick_word(tick: float) -> str:
    return formatting.show_large(round_tick(tick))


class Bar(NamedTuple):
    """One bar with an interval around its end.

    Attributes:
        name: of the row.
        value: its length.
        low: begin of the interval, or None.
        high: end of the interval, or None.
        style: a CSS class.
        shown: the value as text; empty for the plot's number format.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    style: str = "c0"
    shown: str = ""


def bars(rows: Sequence[Bar], *, label: str, form: str = "number") -> Markup:
    """Return horizontal bars from zero with intervals and figures."""
    most = max((max(row.value, row.high or 0.0) for row in rows), default=0.0) or 1.0

    def place(value: float) -> str:
        return f"{svg.trim(100 * min(1.0, max(0.0, value / most)))}%"

    drawn = []
    for row in rows:
        parts = [tag("rect", {"class": f"bar {row.style}", "y": 4, "width": place(row.value), "height": 14, "rx": 2})]
        if row.low is not None and row.high is not None:
            ends = {"x1": place(row.low), "x2": place(row.high), "y1": 11, "y2": 11}
            parts.append(tag("line", {"class": "whisker", **ends}))
            for end in (row.low, row.high):
                parts.append(
                    tag("line", {"class": "whisker", "x1": place(end), "x2": place(end), "y1": 6.5, "y2": 15.5})
                )
        shown = row.shown or FORMATS[form](row.value)
        title = f"{row.name}: {shown}"
        if row.low is not None and row.high is not None:
            title += f" ({FORMATS[form](row.low)} to {FORMATS[form](row.high)})"
        drawn += [
            tag("div", {"class": "bar-name"}, tag("bdi", {}, row.name)),
            tag("svg", {"class": "bar-area", "height": 22, "data-title": title}, *parts),
            tag("div", {"class": "bar-value"}, shown),
        ]
    return tag("div", {"class": "bars", "role": "img", "aria-label": label}, *drawn)


def stacked(parts: Sequence[tuple[str, float, str]], *, label: str, form: str = "percent") -> Markup:
    """Return one bar of adjacent parts; each has a name, a size and a CSS class."""
    whole = sum(size for _, size, _ in parts) or 1.0
    begin, drawn = 0.0, []
    for name, size, style in parts:
        share = size / whole
        shape = {"x": f"{svg.trim(100 * begin)}%", "width": f"{svg.trim(100 * share)}%", "height": 28}
        title = f"{name}: {FORMATS[form](size)}"
        drawn.append(tag("rect", {"class": f"bar {style}", **shape, "data-title": title}, tag("title", {}, title)))
        begin += share
    return tag("svg", {"class": "stacked", "role": "img", "aria-label": label, "height": 28}, *drawn)


class Spread(NamedTuple):
    """The spread of one quantity: smallest, 5 %, median, 95 %, largest."""

    name: str
    values: tuple[float, float, float, float, float]
    style: str = "c0"


def spans(rows: Sequence[Spread], *, label: str, marker: float | None, marker_name: str) -> Markup:
    """Return box plots on a logarithmic axis: a line over the range, a box over 90 %, and a stroke at the median.

    Args:
        rows: values above zero.
        label: description of the plot.
        marker: a value to draw a line at, or None.
        marker_name: its label.
    """
    ends = [value for row in rows for value in (row.values[0], row.values[-1])]
    across = svg.scale_of([*ends, *([marker] if marker else [])], logarithmic=True)

    def place(value: float) -> str:
        return f"{svg.trim(100 * across(value))}%"

    drawn = []
    for row in rows:
        smallest, low, median, high, largest = row.values
        width = f"{svg.trim(100 * (across(high) - across(low)))}%"
        shape = [
            tag("line", {"class": "whisker", "x1": place(smallest), "x2": place(largest), "y1": 14, "y2": 14}),
            tag("rect", {"class": f"bar {row.style}", "x": place(low), "width": width, "y": 6, "height": 16, "rx": 2}),
            tag("line", {"class": "median", "x1": place(median), "x2": place(median), "y1": 4, "y2": 24}),
        ]
        if marker:
            at = {"x1": place(marker), "x2": place(marker), "y1": 0, "y2": 28}
            shape.append(tag("line", {"class": "marker", **at}, tag("title", {}, marker_name)))
        title = f"{row.name}: {', '.join(formatting.show(value) for value in row.values)}"
        drawn += [
            tag("div", {"class": "bar-name"}, tag("bdi", {}, row.name)),
            tag("svg", {"class": "bar-area", "height": 28, "data-title": title}, *shape),
            tag("div", {"class": "bar-value"}, f"{formatting.show(median)} median"),
        ]
    words = [
        tag("text", {"x": place(tick), "y": 14, "text-anchor": anchor_of(across(tick))}, _tick_word(tick))
        for tick in across.ticks(5)
    ]
    axis = tag("svg", {"class": "x", "aria-hidden": "true", "height": 20}, *words)
    drawn += [tag("div", {"class": "gap"}), axis, tag("div", {"class": "gap"})]
    return tag("div", {"class": "bars", "role": "img", "aria-label": label}, *drawn)


class DifferenceBar(NamedTuple):
    """A difference with its interval, and a CSS class."""

    name: str
    value: float
    low: float
    high: float
    style: str = "c0"


def differences(rows: Sequence[DifferenceBar], *, label: str) -> Markup:
    """Return differences of shares, in percent points, as strokes on their intervals, with a line at zero."""
    across = svg.scale_of([end for row in rows for end in (row.low, row.high, 0.0)])

    def place(value: float) -> str:
        return f"{svg.trim(100 * across(value))}%"

    drawn = []
    for row in rows:
        shown = f"{100 * row.value:+.1f} ({100 * row.low:+.1f} to {100 * row.high:+.1f})"
        width = f"{svg.trim(100 * (across(row.high) - across(row.low)))}%"
        shape = [
            tag(
                "rect", {"class": f"bar {row.style}", "x": place(row.low), "width": width, "y": 7, "height": 8, "rx": 2}
            ),
            tag("line", {"class": "median", "x1": place(row.value), "x2": place(row.value), "y1": 3, "y2": 19}),
            tag("line", {"class": "marker", "x1": place(0.0), "x2": place(0.0), "y1": 0, "y2": 22}),
        ]
        drawn += [
            tag("div", {"class": "bar-name"}, tag("bdi", {}, row.name)),
            tag("svg", {"class": "bar-area", "height": 22, "data-title": f"{row.name}: {shown}"}, *shape),
            tag("div", {"class": "bar-value"}, shown),
        ]
    words = [
        tag(
            "text",
            {"x": place(tick), "y": 14, "text-anchor": anchor_of(across(tick))},
            f"{100 * tick:+.3g}" if tick else "0",
        )
        for tick in across.ticks(5)
    ]
    axis = tag("svg", {"class": "x", "aria-hidden": "true", "height": 20}, *words)
    drawn += [tag("div", {"class": "gap"}), axis, tag("div", {"class": "gap"})]
    return tag("div", {"class": "bars", "role": "img", "aria-label": label}, *drawn)
