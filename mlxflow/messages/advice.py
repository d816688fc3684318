"""The commands that messages advise; they name the workflow file of this process unless it is the default one."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

_workflow = ""


def name_workflow(shown: str) -> None:
    """Set the workflow file that the commands of later messages name.

    Args:
        shown: its path as the user would write it; empty for the one that commands use by default.
    """
    global _workflow  # one command is about one workflow file
    _workflow = shown


@contextmanager
def about_workflow(shown: str) -> Iterator[None]:
    """Set the workflow file for the messages of a block.

    Args:
        shown: its path as the user would write it; empty for the one that commands use by default.
    """
    before = _workflow
    name_workflow(shown)
    try:
        yield
    finally:
        name_workflow(before)


def command(text: str) -> str:
    """Return a command of `mlxflow` with the workflow file that it needs to be given.

    Args:
        text: the verb and its arguments, such as "report --open".
    """
    option = f" --workflow {shlex.quote(_workflow)}" if _workflow else ""
    return f"mlxflow {text}{option}"


def advise_build(task: str) -> str:
    """Return the advice to build a stage, by the command that needs no `dodo.py` in the user's folder.

    Args:
        task: the stage, or a variant of it.
    """
    return f"Run: {command(f'build {task}')}"
