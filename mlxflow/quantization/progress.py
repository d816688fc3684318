"""Progress of quantizing: bars over layers and over validation rows on a terminal, few lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlxflow.data.token_file import Rows
from mlxflow.messages import terminal

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def show_layers(task: str, count: int) -> Iterator[Callable[[str], None]]:
    """Show the progress over layers on standard error until the block ends.

    Args:
        task: name of the work.
        count: number of layers.

    Yields:
        a function to call with the path of each finished layer.
    """
    with _bar(task, count) as update:
        yield lambda path: update(advance=1, description=terminal.one_line(path)[-40:])


@contextmanager
def show_parts(task: str, doing: str, count: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Show the progress over equal parts on standard error until the block ends: a bar, or a line every ten seconds.

    Args:
        task: name of the work.
        doing: the activity.
        count: number of parts.
        unit: their plural.

    Yields:
        a function to call with a description of each finished part.
    """
    lines, done = _ProgressLines(f"{task}: {doing}", count, unit), 0
    with _bar(task, count) as update:

        def finished(description: str) -> None:
            nonlocal done
            done += 1
            update(completed=done, description=terminal.one_line(description)[-40:])
            if not terminal.console(stderr=True).is_terminal and done < count:
                lines.show(done)

        yield finished


@contextmanager
def watched_rows(task: str, doing: str, rows: Rows) -> Iterator["WatchedRows"]:
    """Show how many of some rows were read on standard error until the block ends: a bar, or a line every ten seconds.

    Args:
        task: name of the stage.
        doing: the activity.
        rows: to read.

    Yields:
        the rows to read instead.
    """
    if not terminal.console(stderr=True).is_terminal:
        yield WatchedRows(rows, _ProgressLines(f"{task}: {doing}", rows.num_rows, "rows").show)
        return
    with _bar(task, rows.num_rows) as update:
        update(description=doing)
        yield WatchedRows(rows, lambda done: update(completed=done, description=doing))


class WatchedRows:
    """Rows for an evaluation that report how many were read before each batch.

    Args:
        rows: tokens and marks.
        watch: gets the number of rows before a batch.
    """

    def __init__(self, rows: Rows, watch: Callable[[int], None]) -> None:
        self._rows = rows
        self._watch = watch

    @property
    def num_rows(self) -> int:
        """The number of rows, R."""
        return self._rows.num_rows

    def batch(self, begin: int, end: int) -> tuple[Any, Any]:
        """Return tokens and marks of consecutive rows, (B, L + 1) each."""
        self._watch(begin)
        return self._rows.batch(begin, end)


class _ProgressLines:
    """A line every ten seconds, with the time left."""

    def __init__(self, begin: str, total: int, unit: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._begin = begin
        self._total = total
        self._unit = unit
        self._clock = clock
        self._started = self._said = clock()

    def show(self, done: int) -> None:
        """Print how many are done, if it is time for a line."""
        now = self._clock()
        if not done or now - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._said = now
        left = (now - self._started) / done * (self._total - done)
        terminal.say(f"{self._begin}, {done:,} of {self._total:,} {self._unit}, {left:,.0f} s left")


@contextmanager
def _bar(task: str, total: int) -> Iterator[Callable[..., None]]:
    """Yield a function that updates a bar on a terminal; it is removed at the end, and not drawn elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = terminal.console(stderr=True)
    columns = (terminal.text_column(task), MofNCompleteColumn(), BarColumn(10), TimeRemainingColumn(compact=True))
    with Progress(
        *columns,
        terminal.text_column("left"),
        terminal.text_column(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as bars:
        bar = bars.add_task("", total=total)
        yield lambda **how: bars.update(bar, **how)
