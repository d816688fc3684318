"""The stages as a graph from left to right, each after the ones it reads from."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup

from mlxflow.report.formatting import shorten
from mlxflow.report.svg import tag


class _Layout(NamedTuple):
    """Sizes in pixels, the number of letters that fit, and whether later stages are below or at the right."""

    style: str
    width: float
    height: float
    ahead: float
    beside: float
    letters: int
    downwards: bool


#: For a wide page, and for a phone; the style sheet shows one of them.
_LAYOUTS = (
    _Layout("graph", 176, 74, 56, 18, 19, False),
    _Layout("graph tall", 112, 66, 34, 10, 13, True),
)


class Box(NamedTuple):
    """One stage.

    Attributes:
        task: its name.
        reads: the tasks it reads from.
        state: a CSS class: fresh, stale, missing, damaged or running.
        lines: text below the name.
    """

    task: str
    reads: tuple[str, ...]
    state: str
    lines: tuple[str, ...]


#: A sign for each state, so that states differ by more than color.
SIGNS = {
    "fresh": "\N{CHECK MARK}",
    "stale": "\N{CLOCKWISE OPEN CIRCLE ARROW}",
    "missing": "\N{EN DASH}",
    "damaged": "!",
    "running": "\N{BLACK RIGHT-POINTING TRIANGLE}",
}


def draw(boxes: Sequence[Box], label: str) -> Markup:
    """Return the graph for a wide and a narrow page; edges implied by others are left out."""
    return Markup("").join(_draw(boxes, label, layout) for layout in _LAYOUTS)


def _draw(boxes: Sequence[Box], label: str, layout: _Layout) -> Markup:
    places = _places(boxes, layout)
    width = max((x for x, _ in places.values()), default=0) + layout.width
    height = max((y for _, y in places.values()), default=0) + layout.height
    pairs = [(one, box.task) for box in boxes for one in _direct(box, boxes) if one in places]
    drawn = [_edge(places[one], places[other], layout) for one, other in pairs]
    drawn += [_box(box, *places[box.task], layout) for box in boxes]
    attributes = {"class": layout.style, "role": "img", "aria-label": label}
    size = {"viewBox": f"-2 -2 {width + 4:.0f} {height + 4:.0f}", "width": width + 4, "height": height + 4}
    return tag("svg", attributes | size, *drawn)


def _places(boxes: Sequence[Box], layout: _Layout) -> dict[str, tuple[float, float]]:
    """Return the upper left corner of each box: one column for each rank, all of them centered."""
    columns = _columns(boxes)
    ranks = {column: [box.task for box in boxes if columns[box.task] == column] for column in columns.values()}
    most = max((len(tasks) for tasks in ranks.values()), default=1)
    length, breadth = (layout.height, layout.width) if layout.downwards else (layout.width, layout.height)
    places: dict[str, tuple[float, float]] = {}
    for column, tasks in ranks.items():
        first = (most - len(tasks)) * (breadth + layout.beside) / 2
        for row, task in enumerate(tasks):
            place = (column * (length + layout.ahead), first + row * (breadth + layout.beside))
            places[task] = (place[1], place[0]) if layout.downwards else place
    return places


def _columns(boxes: Sequence[Box]) -> dict[str, int]:
    """Return the rank of each stage: the number of stages before it on the longest path."""
    columns: dict[str, int] = {}
    for box in boxes:  # each after the ones it reads from
        columns[box.task] = 1 + max((columns[read] for read in box.reads if read in columns), default=-1)
    return columns


def _direct(box: Box, boxes: Sequence[Box]) -> list[str]:
    """Return the inputs of a stage that are not inputs, directly or indirectly, of another input."""
    reads: Mapping[str, tuple[str, ...]] = {one.task: one.reads for one in boxes}
    above: set[str] = set()
    waiting = [further for read in box.reads for further in reads.get(read, ())]
    while waiting:
        one = waiting.pop()
        if one not in above:
            above.add(one)
            waiting += reads.get(one, ())
    return [one for one in box.reads if one not in above]


def _edge(start: tuple[float, float], end: tuple[float, float], layout: _Layout) -> Markup:
    bend = layout.ahead * 0.6
    if layout.downwards:
        x, y, to_x, to_y = start[0] + layout.width / 2, start[1] + layout.height, end[0] + layout.width / 2, end[1]
        path = f"M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"
    else:
        x, y, to_x, to_y = start[0] + layout.width, start[1] + layout.height / 2, end[0], end[1] + layout.height / 2
        path = f"M{x:.0f} {y:.0f}C{x + bend:.0f} {y:.0f} {to_x - bend:.0f} {to_y:.0f} {to_x:.0f} {to_y:.0f}"
    return tag("path", {"class": "edge", "d": path})


def _box(box: Box, x: float, y: float, layout: _Layout) -> Markup:
    pad = 8 if layout.downwards else 12
    shape = {"x": x, "y": y, "width": layout.width, "height": layout.height, "rx": 8}
    sign = {"class": "sign", "x": x + layout.width - pad, "y": y + 22, "text-anchor": "end"}
    words = [
        tag("text", {"class": "box-name", "x": x + pad, "y": y + 22}, shorten(box.task, layout.letters)),
        *([] if layout.downwards and box.state == "fresh" else [tag("text", sign, SIGNS[box.state])]),
        *(
            tag("text", {"class": "box-line", "x": x + pad, "y": y + 40 + 16 * row}, shorten(line, layout.letters + 8))
            for row, line in enumerate(box.lines)
        ),
    ]
    return tag("g", {"class": f"box {box.state}"}, tag("title", {}, box.task), tag("rect", shape), *words)
