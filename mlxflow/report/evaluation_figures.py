"""The figures of an evaluation for its report: accuracies, differences, and warnings about unlike questions."""

from collections.abc import Iterator, Sequence

from mlxflow.evaluation.accuracy import accuracy_of, paired_difference
from mlxflow.evaluation.job import Evaluated
from mlxflow.report.stage_reports.evaluate import AccuracyRow, DifferenceRow


def accuracy_row(one: Evaluated) -> AccuracyRow:
    """Return the figures of a model on a task."""
    found = accuracy_of([item.score for item in one.result.items])
    return AccuracyRow(
        task=one.task,
        model=one.model,
        kind=one.result.kind,
        uses_chat=one.result.uses_chat,
        items=len(one.result.items),
        accuracy=found.mean,
        standard_error=found.standard_error,
        truncated=one.result.num_truncated,
        metrics=one.result.metrics,
    )


def difference_rows(found: Sequence[Evaluated], reference: str, *, confidence: float) -> Iterator[DifferenceRow]:
    """Yield the difference of each other model from the first on each task.

    Args:
        found: every result.
        reference: the first model.
        confidence: of the intervals.
    """
    first = {one.task: [item.score for item in one.result.items] for one in found if one.model == reference}
    for one in found:
        if one.model != reference:
            scores = [item.score for item in one.result.items]
            compared = paired_difference(scores, first[one.task], confidence=confidence)
            yield DifferenceRow(task=one.task, model=one.model, reference=reference, **compared._asdict())


def warnings_of(rows: Sequence[AccuracyRow]) -> Iterator[str]:
    """Yield a line for each task that only some models are asked through a chat template."""
    for task in dict.fromkeys(row.task for row in rows):
        by_chat = {row.uses_chat: row.model for row in rows if row.task == task}
        if len(by_chat) > 1:
            yield (
                f"{task}: {by_chat[True]} is asked through its chat template, and {by_chat[False]} without one, which "
                'is part of their difference. Set chat = "never" for the task, or compare models of one kind.'
            )
