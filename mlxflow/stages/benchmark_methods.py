"""What the benchmark stage says of its figures: beside an earlier run, and where the time did not suffice."""

from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from mlxflow.errors import StageError
from mlxflow.system import terminal
from mlxflow.workflow.stage import Context

#: Times that what looks like a regression is measured again before it is called one.
REPETITIONS = 3


def hold_against(
    baseline: Mapping[str, Any],
    report: Mapping[str, Any],
    measure_again: Callable[[Set[str]], Mapping[str, Any]],
    config: Any,
    context: Context,
) -> dict[str, Any]:
    """Compare with an earlier run and return the report's `comparison`.

    Args:
        baseline: the earlier run's report.
        report: this one's.
        measure_again: see `measurement.comparison.confirm`.
        config: the stage's table.
        context: the stage's.

    Raises:
        StageError: a figure is worse by more than is allowed, in every repetition, and it is not noise.
    """
    from mlxflow.benchmarking.report_comparison import compare_reports, confirm, markdown_of_differences, regressions

    if baseline.get("device") != report["device"]:
        name, own = (one.get("device", {}).get("name", "unknown") for one in (baseline, report))
        terminal.say(
            f'{context.task}.baseline = "{config.baseline}": not compared, it was measured on {name}, this on {own}. '
            "mlxflow compare --force compares them."
        )
        return {"baseline": config.baseline, "compared": False}
    differences = compare_reports(baseline, report)
    terminal.write(markdown_of_differences(differences))
    suspects = regressions(differences, config.max_regression)
    if any(one.depends_on_time for one in suspects):
        terminal.say(f"{context.task}: {len(suspects)} figures look worse and are measured again")
    found = confirm(
        baseline,
        suspects,
        measure_again,
        max_regression=config.max_regression,
        most_repetitions=REPETITIONS,
    )
    cleared = [f"{one.what}: {one.figure} {one.change:+.1%}, which was not there again" for one in found.cleared]
    if cleared:
        terminal.say(*(f"{context.task}: {line}: noise between runs" for line in cleared))
    if found.worse:
        lines = [
            f"{one.what}: {one.figure} {one.change:+.1%} ({one.before:,.6g} -> {one.after:,.6g})" for one in found.worse
        ]
        raise StageError(
            f"{context.task}: worse than {config.baseline} beyond the noise and {context.task}.max_regression = "
            f"{config.max_regression:g}, in {found.repetitions + 1} runs:\n" + "\n".join(lines)
        )
    return {
        "baseline": config.baseline,
        "compared": True,
        "figures": len(differences),
        "repetitions": found.repetitions,
        "noise_between_runs": cleared,
    }


def lowered(report: Mapping[str, Any], config: Any) -> Iterator[str]:
    """Yield a line for each thing that was measured less than asked for, as `max_seconds` did not suffice."""
    because = f"max_seconds = {config.max_seconds:g} did not suffice for more"
    timed = [row["num_steps"] for row in report["training"] if "num_steps" in row]
    if timed and min(timed) < config.num_steps - config.num_steps % max(1, config.num_steps // 20):
        yield f"{min(timed)} of {config.num_steps} training steps timed: {because}"
    left_out = sum(str(row.get("error", "")).startswith("not measured") for row in report["training"])
    if left_out:
        yield f"{left_out} ways of training left out: {because}"
    steps = min((row["steps"][-1] for row in report.get("convergence", ())), default=config.convergence_steps)
    if steps < config.convergence_steps:
        yield f"{steps} of {config.convergence_steps} steps of convergence: {because}"
    rows = min((row["validation_rows"] for row in report["models"] if row.get("has_fewer_rows")), default=0)
    if rows:
        yield f"perplexity of {rows} of {config.max_validation_rows} validation rows: {because}"
