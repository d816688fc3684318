"""Progress of reading a corpus: a bar on a terminal, a line every ten seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlxflow.data.shard_builder import Progress
from mlxflow.messages import terminal

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BEFORE_BAR = 0.3


@contextmanager
def show_progress(doing: str, total_bytes: int) -> Iterator[tuple[Progress, Callable[[], None]]]:
    """Show progress on standard error until the context ends.

    Args:
        doing: the activity, in one word.
        total_bytes: of all files, as stored on the disk.

    Yields:
        the counts, and a function that shows them when due.
    """
    progress = Progress()
    shown = _ByteBar(doing, total_bytes) if sys.stderr.isatty() else _Lines(doing, total_bytes)
    begin = time.perf_counter()

    def watch() -> None:
        seconds = time.perf_counter() - begin
        if seconds > _SECONDS_BEFORE_BAR:  # short work needs no bar
            shown.show(progress, seconds)

    try:
        yield progress, watch
        watch()
    finally:
        shown.close()


@contextmanager
def show_waiting(doing: str) -> Iterator[Callable[[], None]]:
    """Print the activity once if it takes long."""
    begin = time.perf_counter()
    is_printed = False

    def watch() -> None:
        nonlocal is_printed
        if not is_printed and time.perf_counter() - begin > 5:
            is_printed = True
            terminal.say(doing)

    yield watch


@contextmanager
def show_activity(doing: str) -> Iterator[None]:
    """Show an activity without known length on a terminal until the context ends; nothing in a log.

    Args:
        doing: the activity.
    """
    if not sys.stderr.isatty():
        yield
        return
    from rich.text import Text

    with terminal.console(stderr=True).status(Text(doing)):
        yield


def _say(progress: Progress, seconds: float) -> str:
    text = f"{progress.read_bytes / 1e6:,.0f} MB"
    if progress.documents:
        text += f"  {progress.documents:,} documents  {progress.tokens / seconds:,.0f} tokens/s"
    return text


class _Lines:
    """A line every ten seconds."""

    def __init__(self, doing: str, total_bytes: int) -> None:
        self._doing = doing
        self._total = total_bytes
        self._last = 0.0

    def show(self, progress: Progress, seconds: float) -> None:
        if seconds - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = seconds
        left = seconds * (self._total / max(1, progress.read_bytes) - 1)
        terminal.say(f"{self._doing}  {_say(progress, seconds)}  {left:,.0f} s left")

    def close(self) -> None:
        pass


class _ByteBar:
    """A bar that is redrawn in place."""

    def __init__(self, doing: str, total_bytes: int) -> None:
        from rich.progress import BarColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (terminal.text_column(doing), BarColumn(10), TimeRemainingColumn(compact=True))
        left, figures = terminal.text_column("left"), terminal.text_column()
        self._bars = Bars(*columns, left, figures, console=terminal.console(stderr=True), transient=True)
        self._bar = self._bars.add_task("", total=max(1, total_bytes))
        self._begun = False

    def show(self, progress: Progress, seconds: float) -> None:
        if not self._begun:
            self._bars.start()
            self._begun = True
        self._bars.update(self._bar, completed=progress.read_bytes, description=_say(progress, seconds))

    def close(self) -> None:
        if self._begun:
            self._bars.stop()
