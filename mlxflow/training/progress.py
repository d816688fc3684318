"""Progress of a training run: a bar and its last figures on a terminal, plain lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from mlxflow.messages import terminal
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.training.recorder import Log


@contextmanager
def show_progress(task: str, *, num_steps: int, is_silent: bool = False) -> Iterator[Log]:
    """Show training records on standard error until the block ends.

    Args:
        task: name of the stage.
        num_steps: of the run.
        is_silent: whether nothing is shown.

    Yields:
        a function that takes each record of the training run.
    """
    if is_silent:
        yield lambda record: None
        return
    console = terminal.console(stderr=True)
    if not console.is_terminal:
        yield _StepLines(task, num_steps).show
        return
    columns = (terminal.text_column(task), MofNCompleteColumn(), BarColumn(16), TimeRemainingColumn(compact=True))
    with _StepBar(*columns, terminal.text_column("left"), console=console, transient=True) as bar:
        bar.add_task("", total=num_steps)
        yield bar.show


def steps_to(show: Log) -> Callable[[int], None]:
    """Return a function that advances what `show_progress` shows to a number of steps, without a record of them.

    Args:
        show: the function that it yields.
    """
    return lambda step: show({"kind": "step", "step": step})


class _StepLines:
    """A line for each record, with the time left at the pace of this process."""

    def __init__(self, task: str, num_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._task = task
        self._num_steps = num_steps
        self._clock = clock
        self._begin: tuple[int, float] | None = None

    def show(self, record: dict[str, Any]) -> None:
        """Print a record; a step without one is not worth a line."""
        if record["kind"] == "step":
            return
        step = record["step"]
        begin_step, begin_seconds = self._begin = self._begin or (step, self._clock())
        left = ""
        if record["kind"] == "train" and begin_step < step < self._num_steps:
            seconds = (self._clock() - begin_seconds) / (step - begin_step) * (self._num_steps - step)
            left = f"  {duration(seconds)} left"
        terminal.say(f"{self._task}: step {step} of {self._num_steps}  {'  '.join(figures(record))}{left}")


class _StepBar(Progress):
    """A bar with the last figures of each kind below it, in lines of at most 60 characters."""

    latest: dict[str, list[str]]

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the bar and the lines below it."""
        yield self.make_tasks_table(self.tasks)
        latest = getattr(self, "latest", {})
        loss, *speed = latest.get("train", [""])
        losses = [loss, *latest.get("validation", [])]
        for line in (losses, [*speed, *latest.get("batch_size", [])]):
            if shown := "  ".join(filter(None, line)):
                yield Text(f"  {shown}")

    def show(self, record: dict[str, Any]) -> None:
        """Show a record, or only its step."""
        if record["kind"] != "step":
            self.latest = getattr(self, "latest", {}) | {record["kind"]: figures(record)}
        self.update(self.tasks[0].id, completed=record["step"])


def figures(record: dict[str, Any]) -> list[str]:
    """Return the figures of a record in words."""
    if record["kind"] == "validation":
        return [f"held-out loss {record['loss']:.3f} (perplexity {record['perplexity']:,.1f})"]
    if record["kind"] == "batch_size":
        return [f"batch {record['batch_size']}"]
    loss = "-" if record["loss"] is None else f"{record['loss']:.3f}"
    memory = show_bytes(record["peak_memory_bytes"])
    rate = f"{record['learning_rate']:.1e}"
    return [f"loss {loss}", f"learning rate {rate}", f"{record['tokens_per_second']:,.0f} tokens/s", memory]


def duration(seconds: float) -> str:
    """Return a duration in words, such as `45 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
