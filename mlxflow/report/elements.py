"""What a section of the page is made of; the template knows how each kind looks."""

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup


class Note(NamedTuple):
    """A sentence about something that is missing, damaged or worth a warning."""

    text: str
    kind: str = "note"


class Text(NamedTuple):
    """A plain sentence."""

    text: str
    kind: str = "text"


class Table(NamedTuple):
    """A table of text; the first column names the row.

    Attributes:
        caption: what it shows.
        head: a title for each column.
        rows: cells, as many as there are titles.
        folded: whether it opens only on demand, such as the figures behind a plot.
        words: columns that hold words; the others are aligned as numbers.
    """

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    folded: bool = False
    words: tuple[int, ...] = (0,)
    kind: str = "table"


class Figure(NamedTuple):
    """A plot, its title, and the same figures as a table for whoever cannot see it.

    Attributes:
        caption: its title.
        drawing: the plot's markup.
        table: the figures.
        legend: a CSS class and a name for each series.
        wide: whether it takes the whole width.
        hint: what the pointer and the keys do, or nothing.
    """

    caption: str
    drawing: Markup
    table: Table | None = None
    legend: tuple[tuple[str, str], ...] = ()
    wide: bool = False
    hint: str = ""
    kind: str = "figure"


class Sample(NamedTuple):
    """Text that a model wrote."""

    model: str
    prompt: str
    text: str
    kind: str = "sample"


class Exchange(NamedTuple):
    """A question, what a model answered, and the answer in the data; empty where it is not known."""

    model: str
    question: str
    text: str
    answer: str
    kind: str = "exchange"


class Code(NamedTuple):
    """Text to read or to copy as it is."""

    caption: str
    text: str
    folded: bool = True
    kind: str = "code"


class Sides(NamedTuple):
    """The same thing of two runs, side by side."""

    titles: tuple[str, str]
    sides: tuple["list[Block]", "list[Block]"]
    kind: str = "sides"


Block = Note | Text | Table | Figure | Sample | Exchange | Code | Sides


class Section(NamedTuple):
    """One part of the page."""

    id: str
    title: str
    blocks: list[Block]


class Answer(NamedTuple):
    """One line at the top of the page: what was asked, and a figure with a sentence."""

    question: str
    figure: str
    sentence: str
    section: str
