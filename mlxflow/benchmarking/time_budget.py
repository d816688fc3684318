"""A time budget for measurements, and their progress lines."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mlxflow.messages import terminal
from mlxflow.report.stage_reports.benchmark import ConvergenceCurve
from mlxflow.report.stage_reports.benchmark_rows import ModelRow, TrainingRow

# Seconds between two progress lines
_SECONDS_BETWEEN_LINES = 10.0
# Work that is estimated to take less is not announced
_WORTH_A_LINE_SECONDS = 5.0

#: How the error of a row begins that was left out because the time was over.
NOT_MEASURED = "not measured"


class Budget:
    """Seconds for several pieces of work; time that one does not use is available to the next.

    Args:
        seconds: for all of them; 0 for no limit.
        task: prefix of each line.
        clock: returns the time in seconds.
        say: prints a line.
    """

    def __init__(
        self,
        seconds: float,
        *,
        task: str,
        clock: Callable[[], float] = time.perf_counter,
        say: Callable[[str], None] = terminal.say,
    ) -> None:
        self.seconds = seconds
        self._task = task
        self._clock = clock
        self._say_line = say
        self._begin = clock()
        self._end = self._begin + seconds if seconds else float("inf")
        self._part_end = self._end
        self._said = self._begin

    def begin(self, share: float) -> None:
        """Begin a piece of work that should end when this share of all seconds is spent."""
        if self.seconds:
            self._part_end = max(self._clock(), min(self._end, self._begin + share * self.seconds))

    @property
    def left(self) -> float:
        """Remaining seconds of this piece of work; infinite without a limit."""
        return max(0.0, self._part_end - self._clock())

    @property
    def is_over(self) -> bool:
        """Whether this piece of work has no time left."""
        return self.left <= 0

    def note(self, text: str) -> None:
        """Print a line about the work."""
        self._say_line(f"{self._task}: {text}")

    def announce(self, what: str, seconds: float) -> None:
        """Print what begins and the estimated time, with the remaining time if that is shorter."""
        about = f"about {seconds:,.0f} s"
        if seconds > self.left:
            about += f", but max_seconds = {self.seconds:g} leaves {self.left:,.0f} s"
        elif seconds < _WORTH_A_LINE_SECONDS:
            return
        self._say_line(f"{self._task}: {what}: {about}")
        self._said = self._clock()

    def progress(self, what: str, done: int, of: int, seconds: float) -> None:
        """Print the progress of a piece of work, at most every ten seconds.

        Args:
            what: name of the work.
            done: finished parts.
            of: parts in total.
            seconds: time spent on the finished parts.
        """
        if self._clock() - self._said < _SECONDS_BETWEEN_LINES or done >= of or self.is_over:
            return
        self._said = self._clock()
        left = f", {min(self.left, seconds / done * (of - done)):,.0f} s left" if done and seconds else ""
        self._say_line(f"{self._task}: {what} {done} of {of}{left}")


class AskedAmounts(NamedTuple):
    """The requested amount of each part of a benchmark.

    Attributes:
        num_steps: timed training steps.
        convergence_steps: steps of the loss curves.
        max_validation_rows: rows of the perplexity.
        max_seconds: the time budget.
    """

    num_steps: int
    convergence_steps: int
    max_validation_rows: int
    max_seconds: float


def lowered(
    requested: AskedAmounts,
    *,
    training: Sequence[TrainingRow],
    convergence: Sequence[ConvergenceCurve],
    models: Sequence[ModelRow],
) -> Iterator[str]:
    """Yield a line for each part that was measured less than requested, because `max_seconds` did not suffice.

    Args:
        requested: the requested amounts.
        training: rows of the report.
        convergence: curves of the report.
        models: rows of the report.
    """
    because = f"max_seconds = {requested.max_seconds:g} did not suffice for more"
    timed = [row.num_steps for row in training if row.num_steps is not None]
    if timed and min(timed) < requested.num_steps - requested.num_steps % max(1, requested.num_steps // 20):
        yield f"{min(timed)} of {requested.num_steps} training steps timed: {because}"
    left_out = sum((row.error or "").startswith(NOT_MEASURED) for row in training)
    if left_out:
        yield f"{left_out} ways of training left out: {because}"
    # all curves were trained in turns; one whose loss did not stay finite ends before
    steps = max((curve.steps[-1] for curve in convergence), default=requested.convergence_steps)
    if steps < requested.convergence_steps:
        yield f"{steps} of {requested.convergence_steps} steps of convergence: {because}"
    rows = min((row.validation_rows or 0 for row in models if row.has_fewer_rows), default=0)
    if rows:
        yield f"perplexity of {rows} of {requested.max_validation_rows} validation rows: {because}"
