"""The figures of an evaluate stage in report.toml."""

import msgspec

from mlxflow.storage.report_structs import Count, ReportTable, StageReport


class AccuracyRow(ReportTable, frozen=True, kw_only=True):
    """A model on a task.

    Attributes:
        task: its name.
        model: its name, such as "quantize:q4".
        kind: "completion", "choice", "exact match", or "lm-eval".
        uses_chat: whether the chat template wrote the prompts.
        items: scored.
        accuracy: mean score of the items.
        standard_error: of that mean.
        truncated: prompts that did not fit into the model's context whole.
        metrics: further figures of the task, by name.
    """

    task: str
    model: str
    kind: str
    uses_chat: bool = False
    items: Count
    accuracy: float
    standard_error: float
    truncated: Count = 0
    metrics: dict[str, float] = msgspec.field(default_factory=dict)


class DifferenceRow(ReportTable, frozen=True, kw_only=True):
    """A model compared with the first one on the same items of a task.

    Attributes:
        task: its name.
        model: its name.
        reference: the first model.
        difference: the model's accuracy minus the reference's.
        low: lower end of its confidence interval.
        high: upper end.
        better: items on which the model scores higher.
        worse: items on which it scores lower.
    """

    task: str
    model: str
    reference: str
    difference: float
    low: float
    high: float
    better: Count
    worse: Count

    @property
    def verdict(self) -> str:
        """The difference compared with 0 by its interval."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "within the noise"


class EvaluateRun(ReportTable, frozen=True, kw_only=True):
    """The stage's own keys of the table `run`.

    Attributes:
        computed: results of a model on a task that this run computed.
        known: those that an earlier run had computed.
    """

    computed: Count
    known: Count


class EvaluateReport(StageReport, frozen=True, kw_only=True):
    """The figures of an evaluate stage.

    Attributes:
        confidence: of the intervals of differences.
        accuracies: of each model on each task, in the order of the tasks.
        differences: of each other model from the first; empty for one model.
        warnings: about models that were not asked in the same way.
        run: what was computed.
    """

    confidence: float
    accuracies: tuple[AccuracyRow, ...]
    differences: tuple[DifferenceRow, ...] = ()
    warnings: tuple[str, ...] = ()
    run: EvaluateRun
