"""Comparison of a benchmark with an earlier one; figures that look worse are measured again before that is an error."""

from collections.abc import Callable, Set

from mlxflow.benchmarking.report_comparison import (
    Confirmation,
    Difference,
    HasRows,
    compare_reports,
    confirm,
    markdown_of_differences,
    regressions,
)
from mlxflow.messages import terminal
from mlxflow.messages.errors import StageError
from mlxflow.messages.markdown_tables import write_markdown
from mlxflow.report.stage_reports.benchmark import BenchmarkReport, ComparisonFigures

#: How often a figure that looks worse is measured again.
REPETITIONS = 3


def compare_with_baseline(
    baseline: BenchmarkReport,
    report: BenchmarkReport,
    measure_again: Callable[[Set[str]], HasRows],
    *,
    name: str,
    max_regression: float,
    task: str,
) -> ComparisonFigures:
    """Compare with an earlier run and return the report's `comparison`.

    Args:
        baseline: the earlier run's report.
        report: of this run.
        measure_again: see `report_comparison.confirm`.
        name: of the earlier run's file, for messages.
        max_regression: share by which a figure may be worse.
        task: the stage with the settings `baseline` and `max_regression`, for messages.

    Raises:
        StageError: a figure is worse by more than `max_regression` and the noise, in every repetition.
    """
    if baseline.device != report.device:
        terminal.say(
            f'{task}.baseline = "{name}": not compared, it was measured on {baseline.device.name}, '
            f"this on {report.device.name}. mlxflow compare --force compares them."
        )
        return ComparisonFigures(baseline=name, compared=False)
    differences = compare_reports(baseline, report)
    write_markdown(markdown_of_differences(differences))
    suspects = regressions(differences, max_regression)
    if any(suspect.depends_on_time for suspect in suspects):
        terminal.say(f"{task}: {len(suspects)} figures look worse and are measured again")
    confirmation = confirm(
        baseline, suspects, measure_again, max_regression=max_regression, most_repetitions=REPETITIONS
    )
    cleared = tuple(f"{_change(one)}, which was not there again" for one in confirmation.cleared)
    if cleared:
        terminal.say(*(f"{task}: {line}: noise between runs" for line in cleared))
    if confirmation.worse:
        raise StageError(_regression(confirmation, name=name, max_regression=max_regression, task=task))
    return ComparisonFigures(
        baseline=name,
        compared=True,
        figures=len(differences),
        repetitions=confirmation.repetitions,
        noise_between_runs=cleared,
    )


def _change(difference: Difference) -> str:
    return f"{difference.what}: {difference.figure} {difference.change:+.1%}"


def _regression(confirmation: Confirmation, *, name: str, max_regression: float, task: str) -> str:
    """Return the message about confirmed regressions."""
    lines = [f"{_change(one)} ({one.before:,.6g} -> {one.after:,.6g})" for one in confirmation.worse]
    return (
        f"{task}: worse than {name} beyond the noise and {task}.max_regression = "
        f"{max_regression:g}, in {confirmation.repetitions + 1} runs:\n" + "\n".join(lines)
    )
