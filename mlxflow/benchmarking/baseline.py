"""Comparison of a benchmark with an earlier one; figures that look worse are measured again before that is an error."""

from collections.abc import Callable, Mapping, Set
from typing import Any

from mlxflow.benchmarking.report_comparison import compare_reports, confirm, markdown_of_differences, regressions
from mlxflow.errors import StageError
from mlxflow.system import terminal

#: How often a figure that looks worse is measured again.
REPETITIONS = 3


def hold_against(
    baseline: Mapping[str, Any],
    report: Mapping[str, Any],
    measure_again: Callable[[Set[str]], Mapping[str, Any]],
    *,
    name: str,
    max_regression: float,
    task: str,
) -> dict[str, Any]:
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
    if baseline.get("device") != report["device"]:
        theirs, ours = (one.get("device", {}).get("name", "unknown") for one in (baseline, report))
        terminal.say(
            f'{task}.baseline = "{name}": not compared, it was measured on {theirs}, this on {ours}. '
            "mlxflow compare --force compares them."
        )
        return {"baseline": name, "compared": False}
    differences = compare_reports(baseline, report)
    terminal.write(markdown_of_differences(differences))
    suspects = regressions(differences, max_regression)
    if any(one.depends_on_time for one in suspects):
        terminal.say(f"{task}: {len(suspects)} figures look worse and are measured again")
    found = confirm(
        baseline,
        suspects,
        measure_again,
        max_regression=max_regression,
        most_repetitions=REPETITIONS,
    )
    cleared = [f"{one.what}: {one.figure} {one.change:+.1%}, which was not there again" for one in found.cleared]
    if cleared:
        terminal.say(*(f"{task}: {line}: noise between runs" for line in cleared))
    if found.worse:
        lines = [
            f"{one.what}: {one.figure} {one.change:+.1%} ({one.before:,.6g} -> {one.after:,.6g})" for one in found.worse
        ]
        raise StageError(
            f"{task}: worse than {name} beyond the noise and {task}.max_regression = "
            f"{max_regression:g}, in {found.repetitions + 1} runs:\n" + "\n".join(lines)
        )
    return {
        "baseline": name,
        "compared": True,
        "figures": len(differences),
        "repetitions": found.repetitions,
        "noise_between_runs": cleared,
    }
