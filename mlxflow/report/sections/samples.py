"""The samples section: answers to held-out questions, and continued texts."""

from collections.abc import Sequence

from mlxflow.report.elements import Block, Exchange, Note, Sample, Section
from mlxflow.report.load_run import Run
from mlxflow.report.sections import beside
from mlxflow.report.stage_reports.report import SampleText


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("samples", "Samples", beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    shown: list[Block] = [block for sample in run.samples if (block := _block(sample)) is not None]
    shown += [Note(f"{one.model} could not be asked: {one.error}") for one in run.samples if one.error is not None]
    if run.samples_problem:
        shown.append(Note(run.samples_problem))
    return shown or [Note("No sample was generated: report.models is empty or no model is built.")]


def _block(sample: SampleText) -> Block | None:
    if sample.text is None:
        return None
    if sample.question is not None:
        return Exchange(sample.model, sample.question, sample.text.strip(), sample.answer or "")
    return Sample(sample.model, sample.prompt, sample.text) if sample.prompt is not None else None
