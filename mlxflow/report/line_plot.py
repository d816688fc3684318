"""Line plots as inline SVG: series over one axis with bands, marks and ticks, and the data for the page's script."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from mlxflow.report import formatting, svg
from mlxflow.report.charts import FORMATS, anchor_of, round_tick
from mlxflow.report.svg import Scale, tag

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH = 1000.0
_HEIGHT = 220.0
_LANE = 13.0

# Half the width of the ends of an interval
_CAP = 5

# Length of the line under a single dot
_DOT = "0.1"

# Share of the axis that is left free at both ends of plots that are zoomed together, so that marks there are whole
_MARK_ROOM = 0.016


class Series(NamedTuple):
    """One line of a plot.

    Attributes:
        name: for legend and tooltip.
        x: (N,) ascending.
        y: (N,).
        style: of `style_of`; with ` b` a dashed line.
        points: whether values are drawn as marks instead of a line.
    """

    name: str
    x: "NDArray[Any]"
    y: "NDArray[Any]"
    style: str
    points: bool = False


class Band(NamedTuple):
    """A named interval of the axis, such as a phase.

    Attributes:
        name: for the tooltip.
        begin: on the axis.
        end: on the axis.
        value: a height drawn over the interval; 0 for none.
        lane: row of the band; the first lane is on top.
        style: a CSS class.
    """

    name: str
    begin: float
    end: float
    value: float
    lane: int
    style: str


class Mark(NamedTuple):
    """A highlighted point, such as a peak."""

    x: float
    y: float
    title: str


class Whisker(NamedTuple):
    """The interval of a value, drawn as a vertical line.

    Attributes:
        x: on the axis.
        low: its begin.
        high: its end.
        style: of the value's series.
    """

    x: float
    low: float
    high: float
    style: str


class Axes(NamedTuple):
    """The two axes of a plot.

    Attributes:
        x_name: label of the x axis.
        form: number format of the values, of `charts.FORMATS`.
        x_form: number format of the x axis.
        logarithmic: whether the y axis is logarithmic, if all values are positive.
        from_zero: whether the y axis begins at zero.
        names: of the positions on the x axis, if they have any.
    """

    x_name: str
    form: str = "number"
    x_form: str = "number"
    logarithmic: bool = False
    from_zero: bool = False
    names: Sequence[str] = ()


def lines(
    series: Sequence[Series],
    axes: Axes,
    *,
    label: str,
    group: str = "",
    marks: Sequence[Mark] = (),
    bands: Sequence[Band] = (),
    intervals: Sequence[Whisker] = (),
    height: float = _HEIGHT,
) -> Markup:
    """Return a plot of series over one axis, downsampled with all peaks kept.

    Args:
        series: at least one of them with a point.
        axes: of the plot.
        label: description of the plot for a screen reader.
        group: plots of one group are zoomed together; empty for no zoom.
        marks: highlighted points.
        bands: named intervals of the axis, in lanes above the lines.
        intervals: of values.
        height: in pixels.
    """
    thinned = [curve._replace(x=x, y=y) for curve in series for x, y in [svg.thin(curve.x, curve.y)] if len(x)]
    inner = _scale_across(thinned, bands, room=0.5 if axes.names else 0.0)
    free = _MARK_ROOM * (inner.high - inner.low) if group else 0.0
    across = Scale(inner.low - free, inner.high + free)
    reached = [end for one in intervals for end in (one.low, one.high)]
    up = _scale_up(thinned, [*reached, *(mark.y for mark in marks)], bands, axes)
    ticks = up.ticks(5)
    lanes = (max(band.lane for band in bands) + 1) * _LANE if bands else 0.0
    up = up._replace(high=up.low + (up.high - up.low) * height / (height - lanes))
    drawn = [_grid(ticks, up, height), *_bands(bands, across, up, height)]
    drawn += [_interval(one, across, up, height) for one in intervals]
    drawn += [_line(one, index, across, up, height) for index, one in enumerate(thinned)]
    drawn += [_mark(mark, across, up, height) for mark in marks]
    shape = {
        "class": "area",
        "role": "img",
        "aria-label": label,
        "tabindex": 0,
        "viewBox": f"0 0 {WIDTH:.0f} {height:.0f}",
        "preserveAspectRatio": "none",
        "height": height,
    }
    data = _data(thinned, bands, axes, (across, inner), up)
    attributes = {"class": "plot", "data-group": group or None}
    y_axis, x_axis = _y_axis(ticks, up, axes.form, height), _x_axis(across, axes)
    return tag("div", attributes, y_axis, tag("svg", shape, *drawn), x_axis, data)


def _scale_across(series: Sequence[Series], bands: Sequence[Band], *, room: float) -> Scale:
    ends = [value for curve in series for value in (float(curve.x[0]), float(curve.x[-1]))]
    ends += [end for band in bands for end in (band.begin, band.end)]
    across = Scale(min(ends) - room, max(ends) + room)
    return Scale(across.low - 0.5, across.high + 0.5) if across.low == across.high else across


def _scale_up(series: Sequence[Series], others: Sequence[float], bands: Sequence[Band], axes: Axes) -> Scale:
    ends = [float(value) for curve in series for value in (curve.y.min(), curve.y.max())]
    ends += [*others] + [band.value for band in bands if band.value]
    return svg.scale_of(ends, logarithmic=axes.logarithmic, from_zero=axes.from_zero)


def _data(
    series: Sequence[Series], bands: Sequence[Band], axes: Axes, scales: tuple[Scale, Scale], up: Scale
) -> Markup:
    """Return the data of a plot for the page's script.

    Args:
        series: thinned.
        bands: stretches of the axis.
        axes: of the plot.
        scales: of the axis across, with the room at its ends and without.
        up: of the values.
    """
    across, inner = scales
    data: dict[str, Any] = {
        "form": axes.form,
        "x": axes.x_name,
        "xform": axes.x_form,
        "names": [formatting.clean(name) for name in axes.names],
        "low": across.low,
        "high": across.high,
        "ends": [inner.low, inner.high],
        "up": [up.low, up.high],
        "series": [
            {"name": formatting.clean(curve.name), "style": curve.style, "x": _values(curve.x), "y": _values(curve.y)}
            for curve in series
        ],
    }
    if bands:
        data["bands"] = [[formatting.clean(band.name), *(float(f"{part:.7g}") for part in band[1:4])] for band in bands]
    return tag("script", {"type": "application/json"}, htmlsafe_json_dumps(data, separators=(",", ":")))


def _values(values: "NDArray[Any]") -> list[float]:
    """Return numbers with six digits, more than a plot can show."""
    shown = (float(f"{value:.6g}") for value in values.tolist())
    return [int(value) if value.is_integer() else value for value in shown]


def _grid(ticks: Sequence[float], up: Scale, height: float) -> Markup:
    path = "".join(f"M0 {svg.trim((1 - up(tick)) * height)}H{WIDTH:.0f}" for tick in ticks)
    return tag("path", {"class": "grid", "d": path})


def _line(series: Series, index: int, across: Scale, up: Scale, height: float) -> Markup:
    x, y = series.x.tolist(), series.y.tolist()
    if series.points or len(x) == 1:
        places = [(across(a) * WIDTH, (1 - up(b)) * height) for a, b in zip(x, y, strict=True)]
        length = "0" if len(places) > 1 else _DOT  # a path must have a width
        path = "".join(f"M{svg.trim(a)} {svg.trim(b)}h{length}" for a, b in places)
        dots = tag("path", {"class": f"dots {series.style}", "d": path, "data-series": index})
        if series.style.endswith(("p2", "p3")):  # hollow
            dots += tag("path", {"class": f"dots hole {series.style.rpartition(' ')[2]}", "d": path})
        return dots
    path = svg.path_of(x, y, across, up, WIDTH, height)
    return tag("path", {"class": f"line {series.style}", "d": path, "data-series": index})


def _bands(bands: Sequence[Band], across: Scale, up: Scale, height: float) -> list[Markup]:
    """Return one path for the lanes and one for the heights of each style: paths are shorter than single elements."""
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


def _interval(interval: Whisker, across: Scale, up: Scale, height: float) -> Markup:
    x, top, bottom = across(interval.x) * WIDTH, (1 - up(interval.high)) * height, (1 - up(interval.low)) * height
    path = f"M{svg.trim(x)} {svg.trim(top)}V{svg.trim(bottom)}"
    path += "".join(f"M{svg.trim(x - _CAP)} {svg.trim(end)}h{2 * _CAP}" for end in (top, bottom))
    return tag("path", {"class": f"line {interval.style.partition(' ')[0]}", "d": path})


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
    """Return the labels of the ticks, with enough digits to distinguish them."""
    words = [FORMATS[form](round_tick(tick)) for tick in ticks]
    for digits in range(4, 8):
        if len(set(words)) == len(words) or form not in ("bytes", "number"):
            break
        write = formatting.show_bytes if form == "bytes" else formatting.show
        words = [write(round_tick(tick), digits) for tick in ticks]
    return words


def _x_axis(across: Scale, axes: Axes) -> Markup:
    words = []
    for tick in across.ticks(5):
        place = across(tick)
        if axes.names and not (tick.is_integer() and 0 <= tick < len(axes.names)):
            continue
        anchor = anchor_of(place)
        shown = FORMATS[axes.x_form](round_tick(tick))
        words.append(tag("text", {"x": f"{svg.trim(100 * place)}%", "y": 14, "text-anchor": anchor}, shown))
    axis = tag("svg", {"class": "x", "aria-hidden": "true", "height": 20}, *words)
    return axis + tag("div", {"class": "axis-name", "aria-hidden": "true"}, axes.x_name)
