"""Plots as inline SVG: lines over steps or seconds, bars with intervals, stacked shares, spans of lengths.

Only what holds data is stretched to the width that a page has: a plot is an SVG of 1,000 units without a fixed ratio,
with its axes and words beside it, so letters keep their size on a phone, on a wide screen and on paper.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from mlxflow.report import formatting, svg
from mlxflow.report.svg import Scale, tag

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH = 1000.0
_HEIGHT = 220.0
_LANE = 13.0

#: How values are written, by the name that the page's script knows too.
FORMATS: dict[str, Callable[[Any], str]] = {
    "number": formatting.show,
    "bytes": formatting.show_bytes,
    "seconds": formatting.show_seconds,
    "percent": formatting.show_percent,
}


#: Series that can be told apart in one plot.
STYLES = 32
_COLORS = 8


def style_of(index: int) -> str:
    """Return the CSS classes of one of many series: eight colors, each plain and in three patterns.

    A pattern is how a line is dashed, what shape a mark has, how strong a bar is.
    """
    pattern = index // _COLORS % (STYLES // _COLORS)
    return f"c{index % _COLORS}" + (f" p{pattern}" if pattern else "")


class Series(NamedTuple):
    """One line of a plot.

    Attributes:
        name: for the legend and under the pointer.
        x: (N,) in rising order.
        y: (N,).
        style: of `style_of`; with ` b` a dashed line.
        points: whether each value has a mark of its own instead of a line through all.
    """

    name: str
    x: "NDArray[Any]"
    y: "NDArray[Any]"
    style: str
    points: bool = False


class Band(NamedTuple):
    """A stretch of the axis that has a name, such as a phase.

    Attributes:
        name: under the pointer.
        begin: on the axis.
        end: on the axis.
        value: a height that is drawn over the stretch; 0: none.
        lane: bands of one lane lie beside each other, the first one's highest.
        style: a CSS class.
    """

    name: str
    begin: float
    end: float
    value: float
    lane: int
    style: str


class Mark(NamedTuple):
    """A point that is pointed out, such as a peak."""

    x: float
    y: float
    title: str


def lines(
    series: Sequence[Series],
    *,
    label: str,
    x_name: str,
    form: str = "number",
    x_form: str = "number",
    group: str = "",
    logarithmic: bool = False,
    from_zero: bool = False,
    marks: Sequence[Mark] = (),
    bands: Sequence[Band] = (),
    names: Sequence[str] = (),
    height: float = _HEIGHT,
) -> Markup:
    """Return a plot of series over one axis, thinned so that peaks survive.

    Args:
        series: at least one of them with a point.
        label: the plot in a sentence, for a screen reader.
        x_name: what the axis counts.
        form: how values are written, of `FORMATS`.
        x_form: how places on the axis are written.
        group: plots of one group are zoomed together; none where a plot cannot be.
        logarithmic: whether values go by their logarithm, where all are above zero.
        from_zero: whether values begin at zero.
        marks: points to point out.
        bands: stretches of the axis to name, in lanes above the lines.
        names: of the places on the axis, where they have some.
        height: in pixels.
    """
    thinned = [one._replace(x=x, y=y) for one in series for x, y in [svg.thin(one.x, one.y)] if len(x)]
    all_x = [value for one in thinned for value in (float(one.x[0]), float(one.x[-1]))]
    all_y = [float(value) for one in thinned for value in (one.y.min(), one.y.max())]
    all_x += [end for band in bands for end in (band.begin, band.end)]
    all_y += [mark.y for mark in marks] + [band.value for band in bands if band.value]
    up = svg.scale_of(all_y, logarithmic=logarithmic, from_zero=from_zero)
    room = 0.5 if names else 0.0
    across = Scale(min(all_x) - room, max(all_x) + room)
    if across.low == across.high:
        across = Scale(across.low - 0.5, across.high + 0.5)
    ticks = up.ticks(5)
    lanes = (max(band.lane for band in bands) + 1) * _LANE if bands else 0.0
    up = up._replace(high=up.low + (up.high - up.low) * height / (height - lanes))
    drawn = [_grid(ticks, up, height), *_bands(bands, across, up, height)]
    drawn += [_line(one, across, up, height) for one in thinned]
    drawn += [_mark(mark, across, up, height) for mark in marks]
    area = tag(
        "svg",
        {
            "class": "area",
            "role": "img",
            "aria-label": label,
            "tabindex": 0,
            "viewBox": f"0 0 {WIDTH:.0f} {height:.0f}",
            "preserveAspectRatio": "none",
            "height": height,
        },
        *drawn,
    )
    data = {
        "form": form,
        "x": x_name,
        "xform": x_form,
        "names": [formatting.clean(name) for name in names],
        "low": across.low,
        "high": across.high,
        "series": [
            {"name": formatting.clean(one.name), "style": one.style, "x": _values(one.x), "y": _values(one.y)}
            for one in thinned
        ],
    }
    if bands:
        data["bands"] = [[formatting.clean(one.name), *(float(f"{part:.7g}") for part in one[1:4])] for one in bands]
    kept = tag("script", {"type": "application/json"}, htmlsafe_json_dumps(data, separators=(",", ":")))
    attributes = {"class": "plot", "data-group": group or None}
    return tag("div", attributes, _y_axis(ticks, up, form, height), area, _x_axis(across, x_name, x_form, names), kept)


def _values(values: "NDArray[Any]") -> list[float]:
    """Return numbers of six digits, which is more than an eye tells apart."""
    shown = (float(f"{value:.6g}") for value in values.tolist())
    return [int(value) if value.is_integer() else value for value in shown]


def _grid(ticks: Sequence[float], up: Scale, height: float) -> Markup:
    path = "".join(f"M0 {svg.trim((1 - up(tick)) * height)}H{WIDTH:.0f}" for tick in ticks)
    return tag("path", {"class": "grid", "d": path})


def _line(one: Series, across: Scale, up: Scale, height: float) -> Markup:
    x, y = one.x.tolist(), one.y.tolist()
    if one.points or len(x) == 1:
        places = [(across(a) * WIDTH, (1 - up(b)) * height) for a, b in zip(x, y, strict=True)]
        path = "".join(f"M{svg.trim(a)} {svg.trim(b)}h0" for a, b in places)
        dots = tag("path", {"class": f"dots {one.style}", "d": path})
        if one.style.endswith(("p2", "p3")):  # hollow
            dots += tag("path", {"class": f"dots hole {one.style.rpartition(' ')[2]}", "d": path})
        return dots
    return tag("path", {"class": f"line {one.style}", "d": svg.path_of(x, y, across, up, WIDTH, height)})


def _bands(bands: Sequence[Band], across: Scale, up: Scale, height: float) -> list[Markup]:
    """Return a path for the lanes of each style, and one for the heights: paths are shorter than as many elements."""
    drawn = []
    for style in dict.fromkeys(band.style for band in bands):
        lanes = heights = ""
        for band in bands:
            if band.style != style:
                continue
            begin, end = (svg.trim(across(place) * WIDTH) for place in (band.begin, band.end))
            top = band.lane * _LANE
            lanes += f"M{begin} {svg.trim(top)}H{end}v{svg.trim(_LANE - 2)}H{begin}z"
            heights += f"M{begin} {svg.trim((1 - up(band.value)) * height)}H{end}" if band.value else ""
        drawn.append(tag("path", {"class": f"band bar {style}", "d": lanes}))
        if heights:
            drawn.append(tag("path", {"class": f"line {style}", "d": heights}))
    return drawn


def _mark(mark: Mark, across: Scale, up: Scale, height: float) -> Markup:
    path = f"M{svg.trim(across(mark.x) * WIDTH)} {svg.trim((1 - up(mark.y)) * height)}h0"
    return tag("path", {"class": "mark", "d": path}, tag("title", {}, mark.title))


def _y_axis(ticks: Sequence[float], up: Scale, form: str, height: float) -> Markup:
    words = [
        tag("text", {"x": 60, "y": (1 - up(tick)) * height + 4, "text-anchor": "end"}, word)
        for tick, word in zip(ticks, _tick_words(ticks, form), strict=True)
    ]
    return tag("svg", {"class": "y", "aria-hidden": "true", "width": 66, "height": height}, *words)


def _tick_words(ticks: Sequence[float], form: str) -> list[str]:
    """Return the ticks in words, in as many digits as it takes to tell them apart."""
    words = [FORMATS[form](_round(tick)) for tick in ticks]
    for digits in range(4, 8):
        if len(set(words)) == len(words) or form not in ("bytes", "number"):
            break
        write = formatting.show_bytes if form == "bytes" else formatting.show
        words = [write(_round(tick), digits) for tick in ticks]
    return words


def _round(tick: float) -> float:
    return float(f"{tick:.9g}")


def _x_axis(across: Scale, x_name: str, x_form: str, names: Sequence[str]) -> Markup:
    words = []
    for tick in across.ticks(5):
        place = across(tick)
        if names and not (tick.is_integer() and 0 <= tick < len(names)):
            continue
        anchor = "start" if place < 0.04 else "end" if place > 0.96 else "middle"
        shown = FORMATS[x_form](_round(tick))
        words.append(tag("text", {"x": f"{svg.trim(100 * place)}%", "y": 14, "text-anchor": anchor}, shown))
    axis = tag("svg", {"class": "x", "aria-hidden": "true", "height": 20}, *words)
    return axis + tag("div", {"class": "axis-name", "aria-hidden": "true"}, x_name)


class Bar(NamedTuple):
    """One bar with an interval around its end.

    Attributes:
        name: of the row.
        value: its length.
        low: where the interval begins, or None.
        high: where it ends, or None.
        style: a CSS class.
        shown: the value in words; empty: as the plot's form writes it.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    style: str = "c0"
    shown: str = ""


def bars(rows: Sequence[Bar], *, label: str, form: str = "number") -> Markup:
    """Return horizontal bars from zero with their intervals and figures."""
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
    """Return one bar of parts side by side; each is a name, a size and a CSS class."""
    whole = sum(size for _, size, _ in parts) or 1.0
    begin, drawn = 0.0, []
    for name, size, style in parts:
        share = size / whole
        shape = {"x": f"{svg.trim(100 * begin)}%", "width": f"{svg.trim(100 * share)}%", "height": 28}
        title = f"{name}: {FORMATS[form](size)}"
        drawn.append(tag("rect", {"class": f"bar {style}", **shape, "data-title": title}, tag("title", {}, title)))
        begin += share
    return tag("svg", {"class": "stacked", "role": "img", "aria-label": label, "height": 28}, *drawn)


class Span(NamedTuple):
    """The spread of one quantity: smallest, 5 %, median, 95 %, largest."""

    name: str
    values: tuple[float, float, float, float, float]
    style: str = "c0"


def spans(rows: Sequence[Span], *, label: str, marker: float | None, marker_name: str) -> Markup:
    """Return a line from the smallest to the largest, a box over nine tenths and a stroke at the median; by logarithm.

    Args:
        rows: values above zero.
        label: the plot in a sentence.
        marker: a value to draw a line at, or None.
        marker_name: what it is.
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
        tag("text", {"x": place(tick), "y": 14, "text-anchor": "middle"}, formatting.show_large(_round(tick)))
        for tick in across.ticks(5)
    ]
    axis = tag("svg", {"class": "x", "aria-hidden": "true", "height": 20}, *words)
    drawn += [tag("div", {}), axis, tag("div", {})]
    return tag("div", {"class": "bars", "role": "img", "aria-label": label}, *drawn)
