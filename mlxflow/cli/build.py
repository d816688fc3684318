"""`mlxflow build`: build stale stages like `doit`, without a `dodo.py`."""

import argparse

from mlxflow.cli.arguments import add_workflow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow build`."""
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="built with what they need; default: every stage")
    parser.add_argument("-n", "--processes", type=int, default=0, metavar="N", help="independent stages at a time")
    parser.add_argument("--plan", action="store_true", help="print what would run and why, and run nothing")
    parser.add_argument("--no-wait", action="store_true", help="fail when another build uses the same artifacts")
    add_workflow(parser)


def run(parsed: argparse.Namespace) -> int:
    """Build the stages, or print what would be built, and return the exit code."""
    from mlxflow.tasks.build import run_doit

    options = [*(["-n", str(parsed.processes)] if parsed.processes else []), *(["--no-wait"] if parsed.no_wait else [])]
    verb = ["plan"] if parsed.plan else ["run", *options]
    return run_doit([*verb, f"workflow={parsed.workflow}", *parsed.stages])
