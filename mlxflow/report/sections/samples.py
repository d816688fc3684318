"""What the models wrote: answers to questions from held-out conversations, and texts continued."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlxflow.report.elements import Block, Exchange, Note, Sample, Section
from mlxflow.report.load_run import Run
from mlxflow.report.sections import beside


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("samples", "Samples", beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    shown: list[Block] = [block for one in run.samples if (block := _block(one)) is not None]
    shown += [
        Note(f"{one.get('model')} could not be asked: {one['error']}")
        for one in run.samples
        if isinstance(one.get("error"), str)
    ]
    if run.samples_problem:
        shown.append(Note(run.samples_problem))
    return shown or [Note("No model was asked for a sample: report.models is empty or no model is built.")]


def _block(one: Mapping[str, Any]) -> Block | None:
    model, text, prompt, question = (one.get(key) for key in ("model", "text", "prompt", "question"))
    if not isinstance(model, str) or not isinstance(text, str):
        return None
    if isinstance(question, str):
        return Exchange(model, question, text.strip(), str(one.get("answer", "")))
    return Sample(model, prompt, text) if isinstance(prompt, str) else None
