"""Markdown whose tables are drawn on a terminal; in a pipe or file it stays Markdown."""

import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from mlxflow.messages import terminal

if TYPE_CHECKING:
    from rich.table import Table

_RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+")


def write_markdown(text: str) -> None:
    """Print Markdown on standard output, with tables drawn to the width of the terminal if it is one."""
    if sys.stdout is None or not sys.stdout.isatty():
        terminal.write(text)
        return
    console = terminal.console()
    for is_table, group in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        lines = list(group)
        if is_table and len(lines) > 1 and _RULE.fullmatch(lines[1]):
            console.print(_drawn(lines, console.width))
        else:
            for line in lines:
                console.print(line, soft_wrap=True)


def table_of(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; all columns but the first are numbers, aligned on the right.

    Args:
        titles: of the columns.
        rows: their cells as text; a "|" in a cell is written as a slash.
    """
    lines = [
        titles,
        ["---", *["--:"] * (len(titles) - 1)],
        *([terminal.one_line(cell).replace("|", "/") for cell in row] for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _drawn(lines: Sequence[str], width: int) -> "Table":
    """Return a table of rich for the lines of a Markdown table; a first column up to half the width is not folded."""
    from rich import box
    from rich.table import Table

    header, rule, *rows = [_cells(line) for line in lines]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    longest = max(len(cells[0]) for cells in (header, *rows))
    for number, (title, dashes) in enumerate(zip(header, rule, strict=True)):
        least = longest if number == 0 and longest <= width // 2 else None
        table.add_column(title, justify="right" if dashes.endswith(":") else "left", overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*row)
    return table


def _cells(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
