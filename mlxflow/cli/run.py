"""`mlxflow run`: runs one stage in this process."""

import argparse

from mlxflow.cli.arguments import add_workflow, read_stage, user_path
from mlxflow.messages import terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow run`."""
    parser.add_argument("stage", help="such as train or quantize:q4")
    parser.add_argument(
        "--into", type=user_path, help="write the artifact there and keep the workflow's artifact unchanged"
    )
    add_workflow(parser)


def run(parsed: argparse.Namespace) -> None:
    """Run a stage: with the data from doit if doit started this process, else under doit's locks."""
    from mlxflow.device.child_processes import end_with_parent
    from mlxflow.workflow import handover
    from mlxflow.workflow.disk_queries import Disk
    from mlxflow.workflow.execution import execute_stage, run_stage
    from mlxflow.workflow.loader import load_workflow

    started_by_doit = end_with_parent()
    if started_by_doit and (received := handover.receive()):
        text, lookups = received.basis
        workflow = load_workflow(parsed.workflow, Disk(parsed.workflow.parent, lookups), text.encode())
        execute_stage(workflow, workflow.find(parsed.stage), parsed.into, received)
        return
    workflow, one = read_stage(parsed)
    execute = execute_stage if started_by_doit else run_stage
    execute(workflow, one, parsed.into)
    if not started_by_doit and workflow.tracking.to:
        from mlxflow.workflow.stage_tracking import closing_lines_of

        terminal.say(*closing_lines_of(workflow.root))
