"""The progress bar over layers: shown on a terminal, silent in a log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlxflow.messages import terminal


@contextmanager
def show_layers(task: str, count: int) -> Iterator[Callable[[str], None]]:
    """Show the progress over layers on standard error until the block ends.

    Args:
        task: name of the work.
        count: number of layers.

    Yields:
        a function to call with the path of each finished layer.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = terminal.console(stderr=True)
    columns = (terminal.text_column(task), MofNCompleteColumn(), BarColumn(10), terminal.text_column())
    with Progress(
        *columns, TimeRemainingColumn(compact=True), console=console, disable=not console.is_terminal
    ) as bars:
        bar = bars.add_task("", total=count)
        yield lambda path: bars.update(bar, advance=1, description=terminal.one_line(path)[-40:])
