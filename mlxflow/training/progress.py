"""Progress of a training run: a bar on a terminal, plain lines in a log."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from mlxflow.messages import terminal
from mlxflow.training.recorder import Log


@contextmanager
def show_progress(*, num_steps: int) -> Iterator[Log]:
    """Show training records on standard error until the block ends.

    Yields:
        a function that takes each record of the training run.
    """
    console = terminal.console(stderr=True)
    if not console.is_terminal:
        yield _print_line
        return
    columns = (MofNCompleteColumn(), BarColumn(8), terminal.text_column(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, transient=False) as progress:
        bar = progress.add_task("", total=num_steps)
        latest = {
            "train": "",
            "validation": "",
            "batch_size": "",
        }  # the last value of each; perplexity is of validation

        def log(record: dict[str, Any]) -> None:
            latest[record["kind"]] = _say(record)
            first, *others = filter(None, [latest["train"], latest["validation"], latest["batch_size"]])
            described = first + "\n" + "  ".join(others)  # two lines: one would be too long
            progress.update(bar, completed=record["step"], description=described)

        yield log


def _print_line(record: dict[str, Any]) -> None:
    terminal.say(f"step {record['step']:>6}  {_say(record)}")


def _say(record: dict[str, Any]) -> str:
    """Return a record in short, for a bar on a terminal with 80 columns."""
    if record["kind"] == "validation":
        return f"perplexity {record['perplexity']:,.1f}"
    if record["kind"] == "batch_size":
        return f"batch {record['batch_size']}"
    memory = record["peak_memory_bytes"] / 1e9
    loss = "-" if record["loss"] is None else f"{record['loss']:.3f}"
    rate = f"{record['learning_rate']:.1e}"
    return f"loss {loss}  lr {rate}  {record['tokens_per_second']:,.0f} learned tokens/s  {memory:.2f} GB"
