"""Command-line arguments shared by several verbs, and loading the workflow that they name."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mlxflow.storage import layout, paths

if TYPE_CHECKING:
    from mlxflow.workflow.model import Stage, Workflow


def user_path(text: str) -> Path:
    """Return a path of the command line; `~`, which a shell leaves alone in `--option=~/x`, is the home folder."""
    return Path(paths.expand(text))


def add_workflow(parser: argparse.ArgumentParser) -> None:
    """Add `--workflow`, the path of the workflow file."""
    parser.add_argument("--workflow", type=user_path, default=Path(layout.WORKFLOW), help=f"default: {layout.WORKFLOW}")


def read_stage(parsed: argparse.Namespace) -> "tuple[Workflow, Stage]":
    """Return the workflow and the stage that a command line names.

    Raises:
        WorkflowError: the workflow file has mistakes.
        CallError: it has no such stage.
    """
    from mlxflow.workflow.loader import load_workflow

    workflow = load_workflow(parsed.workflow)
    return workflow, workflow.find(parsed.stage)
