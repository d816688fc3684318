"""Text that the models really wrote, and what they were asked to go on with."""

from collections.abc import Sequence

from mlxflow.page.blocks import Block, Note, Sample, Section
from mlxflow.page.reading import Run
from mlxflow.page.sections import beside


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("samples", "Samples", beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    shown: list[Block] = [
        Sample(one["model"], one["prompt"], one["text"])
        for one in run.samples
        if all(isinstance(one.get(key), str) for key in ("model", "prompt", "text"))
    ]
    shown += [
        Note(f"{one.get('model')} could not be asked: {one['error']}")
        for one in run.samples
        if isinstance(one.get("error"), str)
    ]
    if run.samples_problem:
        shown.append(Note(run.samples_problem))
    return shown or [Note("No model was asked for a sample: report.models is empty or no model is built.")]
