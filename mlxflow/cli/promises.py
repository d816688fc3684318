"""`mlxflow promises`: each performance target with its figure from a benchmark, and whether it is met."""

import argparse
import tempfile
from pathlib import Path

from mlxflow.cli.arguments import add_workflow, read_stage
from mlxflow.cli.compare import describe_device
from mlxflow.messages.errors import CallError
from mlxflow.messages.markdown_tables import write_markdown
from mlxflow.stages.benchmark import read_benchmark
from mlxflow.storage import layout
from mlxflow.workflow import stage
from mlxflow.workflow.execution import run_stage
from mlxflow.workflow.model import Stage, Workflow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow promises`."""
    parser.add_argument("--stage", default="benchmark", help="default: benchmark")
    parser.add_argument(
        "--measure", action="store_true", help="measure now; default: the figures of the benchmark stage"
    )
    add_workflow(parser)


def run(parsed: argparse.Namespace) -> int:
    """Print the table of `promises`; return 1 if one does not hold.

    Raises:
        CallError: the stage is no benchmark.
    """
    workflow, one = read_stage(parsed)
    if one.name != "benchmark":
        raise CallError(f"promises: --stage = {parsed.stage}: expected a benchmark stage. Use benchmark (the default).")
    text, all_hold = promises(workflow, one, measure=parsed.measure)
    write_markdown(text)
    return 0 if all_hold else 1


def promises(workflow: Workflow, benchmark_stage: Stage, *, measure: bool) -> tuple[str, bool]:
    """Return a table of every promise with its measured figure, and whether all of them hold.

    Args:
        workflow: the workflow.
        benchmark_stage: its benchmark stage.
        measure: run the benchmark in a scratch folder; else the artifact is read.

    Raises:
        ArtifactError: the artifact is missing or of another version, or an input is missing.
    """
    if measure:
        with tempfile.TemporaryDirectory() as folder:
            run_stage(workflow, benchmark_stage, Path(folder) / "benchmark")
            report = read_benchmark(Path(folder) / "benchmark" / layout.REPORT)
    else:
        report = read_benchmark(
            stage.require(workflow.root / benchmark_stage.folder / layout.REPORT, benchmark_stage.task)
        )
    lines = [f"On {describe_device(report)}:", "", "| promise | measured | holds |", "|---|---|---|"]
    lines += [
        f"| {promise.promise} | {promise.figure or 'not measured'} | {'yes' if promise.holds else 'no'} |"
        for promise in report.promises.values()
    ]
    return "\n".join(lines) + "\n", all(promise.holds for promise in report.promises.values())
