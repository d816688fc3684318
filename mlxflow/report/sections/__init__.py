"""The sections of the page, one module each: from loaded runs to text, tables and plots."""

from collections.abc import Callable, Sequence

from mlxflow.report.elements import Block, Sides
from mlxflow.report.load_run import Run


def beside(runs: Sequence[Run], build: Callable[[Run], list[Block]]) -> list[Block]:
    """Return the blocks of one run, or of several runs side by side."""
    if len(runs) == 1:
        return build(runs[0])
    return [Sides(tuple(run.label for run in runs), tuple(build(run) for run in runs))]
