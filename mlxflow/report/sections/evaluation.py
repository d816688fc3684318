"""The evaluation section: the accuracy of each model on each task, and its difference from the first model."""

from collections.abc import Sequence

from mlxflow.report import charts, colors
from mlxflow.report.elements import Block, Figure, Note, Section, Table
from mlxflow.report.formatting import clean, show, show_interval, show_percent
from mlxflow.report.load_run import Run
from mlxflow.report.sections import beside
from mlxflow.report.stage_reports.evaluate import AccuracyRow, EvaluateReport

# The most rows of a chart; the table has all
_MOST_ROWS = 40


def section(runs: Sequence[Run]) -> Section:
    """Return the section; without blocks if no run evaluates anything."""
    blocks = beside(runs, _blocks) if any(run.of_kind("evaluate") for run in runs) else []
    return Section("evaluation", "Evaluation", blocks)


def _blocks(run: Run) -> list[Block]:
    stages = run.of_kind("evaluate")
    if not stages:
        return [Note("Nothing was evaluated: the workflow has no evaluate stage.")]
    blocks: list[Block] = []
    for one in stages:
        report = one.figures(EvaluateReport)
        if report is None:
            blocks.append(Note(f"{one.task} is not shown: {one.said}"))
            continue
        title = f" of {one.task}" if len(stages) > 1 else ""
        models = list(dict.fromkeys(row.model for row in report.accuracies))
        styles = colors.styles_of_models([*run.models, *models])
        blocks.append(_accuracies(report.accuracies, styles, title))
        if report.differences:
            blocks.append(_differences(report, styles, title))
        if truncated := sum(row.truncated for row in report.accuracies):
            blocks.append(Note(f"{show(truncated)} prompts did not fit into a model's context whole; see the table."))
    return blocks


def _accuracies(rows: Sequence[AccuracyRow], styles: dict[str, str], title: str) -> Figure:
    bars = [
        charts.Bar(
            _name(row.task, row.model),
            row.accuracy,
            max(0.0, row.accuracy - row.standard_error),
            min(1.0, row.accuracy + row.standard_error),
            styles[row.model],
            show_percent(row.accuracy),
        )
        for row in rows[:_MOST_ROWS]
    ]
    cells = [
        (
            clean(row.task),
            clean(row.model),
            f"{row.kind}, chat" if row.uses_chat else row.kind,
            show(row.items),
            show_interval(100 * row.accuracy, 100 * row.standard_error),
            show(row.truncated),
            ", ".join(f"{clean(name)} {show(value)}" for name, value in row.metrics.items()),
        )
        for row in rows
    ]
    head = ("Task", "Model", "Items are", "Items", "Accuracy, %", "Truncated prompts", "Other figures")
    table = Table("Accuracy with its standard error", head, cells, words=(0, 1, 2, 6))
    label = "Accuracy by task and model. " + " ".join(f"{bar.name}: {bar.shown}." for bar in bars)
    drawn = charts.bars(bars, label=label, form="percent")
    return Figure(f"Accuracy{title}; the whiskers are one standard error", drawn, table, wide=True)


def _differences(report: EvaluateReport, styles: dict[str, str], title: str) -> Figure:
    rows = report.differences
    drawn = [
        charts.DifferenceBar(_name(row.task, row.model), row.difference, row.low, row.high, styles[row.model])
        for row in rows[:_MOST_ROWS]
    ]
    interval = f"{report.confidence:.0%} interval"
    cells = [
        (
            clean(row.task),
            clean(row.model),
            clean(row.reference),
            f"{100 * row.difference:+.1f}",
            f"{100 * row.low:+.1f} to {100 * row.high:+.1f}",
            show(row.better),
            show(row.worse),
            row.verdict,
        )
        for row in rows
    ]
    head = ("Task", "Model", "Minus", "Points", interval, "Items only it gets right", "Only the other", "Verdict")
    table = Table("Differences item by item, in percent points", head, cells, words=(0, 1, 2, 7))
    label = "Differences in accuracy. " + " ".join(f"{row.name}: {100 * row.value:+.1f}." for row in drawn)
    caption = f"Difference from {clean(rows[0].reference)}{title} in percent points, with its {interval}"
    return Figure(caption, charts.differences(drawn, label=label), table, wide=True)


def _name(task: str, model: str) -> str:
    return f"{clean(task)}, {clean(model)}"
