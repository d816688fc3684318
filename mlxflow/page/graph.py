"""The stages as a graph from left to right, each after the ones it reads from."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from mlxflow.page.svg import tag
from mlxflow.page.text import shorten

_BOX_WIDTH, _BOX_HEIGHT = 176, 74
_GAP_X, _GAP_Y = 56, 18


class Box(NamedTuple):
    """One stage.

    Attributes:
        task: its name.
        reads: the tasks it reads from.
        state: a CSS class: fresh, stale, missing or damaged.
        lines: what is written below the name.
    """

    task: str
    reads: tuple[str, ...]
    state: str
    lines: tuple[str, ...]


#: A sign for each state, so that none is told by colour alone.
SIGNS = {
    "fresh": "\N{CHECK MARK}",
    "stale": "\N{CLOCKWISE OPEN CIRCLE ARROW}",
    "missing": "\N{EN DASH}",
    "damaged": "!",
}


def draw(boxes: Sequence[Box], label: str) -> Markup:
    """Return the graph; edges that follow from others are left out."""
    columns = _columns(boxes)
    heights = {column: [box.task for box in boxes if columns[box.task] == column] for column in columns.values()}
    tallest = max((len(tasks) for tasks in heights.values()), default=1)
    height = tallest * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y
    places: dict[str, tuple[float, float]] = {}
    for column, tasks in heights.items():
        top = (height - (len(tasks) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y)) / 2
        for row, task in enumerate(tasks):
            places[task] = (column * (_BOX_WIDTH + _GAP_X), top + row * (_BOX_HEIGHT + _GAP_Y))
    width = (max(heights, default=0) + 1) * (_BOX_WIDTH + _GAP_X) - _GAP_X
    edges = [_edge(places[one], places[box.task]) for box in boxes for one in _direct(box, boxes) if one in places]
    drawn = [_box(box, *places[box.task]) for box in boxes]
    attributes = {"class": "graph", "role": "img", "aria-label": label, "viewBox": f"-2 -2 {width + 4} {height + 4}"}
    return tag("svg", attributes | {"width": width + 4, "height": height + 4}, *edges, *drawn)


def _columns(boxes: Sequence[Box]) -> dict[str, int]:
    """Return how many stages lie before each one on the longest way to it."""
    columns: dict[str, int] = {}
    for box in boxes:  # each after the ones it reads from
        columns[box.task] = 1 + max((columns[one] for one in box.reads if one in columns), default=-1)
    return columns


def _direct(box: Box, boxes: Sequence[Box]) -> list[str]:
    """Return the stages that a stage reads from and that none of the others it reads from stands on."""
    reads: Mapping[str, tuple[str, ...]] = {one.task: one.reads for one in boxes}
    above: set[str] = set()
    waiting = [further for one in box.reads for further in reads.get(one, ())]
    while waiting:
        one = waiting.pop()
        if one not in above:
            above.add(one)
            waiting += reads.get(one, ())
    return [one for one in box.reads if one not in above]


def _edge(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    x, y = start[0] + _BOX_WIDTH, start[1] + _BOX_HEIGHT / 2
    to_x, to_y = end[0], end[1] + _BOX_HEIGHT / 2
    bend = _GAP_X * 0.6
    return tag(
        "path",
        {
            "class": "edge",
            "d": f"M{x:.0f} {y:.0f}C{x + bend:.0f} {y:.0f} {to_x - bend:.0f} {to_y:.0f} {to_x:.0f} {to_y:.0f}",
        },
    )


def _box(box: Box, x: float, y: float) -> Markup:
    shape = {"x": x, "y": y, "width": _BOX_WIDTH, "height": _BOX_HEIGHT, "rx": 8}
    words = [
        tag("text", {"class": "box-name", "x": x + 12, "y": y + 23}, shorten(box.task, 19)),
        tag("text", {"class": "sign", "x": x + _BOX_WIDTH - 12, "y": y + 23, "text-anchor": "end"}, SIGNS[box.state]),
        *(
            tag("text", {"class": "box-line", "x": x + 12, "y": y + 43 + 17 * index}, shorten(line, 27))
            for index, line in enumerate(box.lines)
        ),
    ]
    return tag("g", {"class": f"box {box.state}"}, tag("title", {}, box.task), tag("rect", dict(shape)), *words)
