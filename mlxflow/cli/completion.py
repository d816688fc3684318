"""`mlxflow completion`: print a script by which a shell completes commands, options, files and stage names."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxflow.cli.arguments import user_path
from mlxflow.messages import terminal
from mlxflow.messages.errors import CallError, UserError
from mlxflow.storage import layout

#: Every supported shell with the command that loads the script; written into the shell's start file it stays.
SHELLS = {
    "bash": 'eval "$(mlxflow completion bash)"',
    "zsh": 'eval "$(mlxflow completion zsh)"',
    "fish": "mlxflow completion fish | source",
}

_STAGES_OPTION = "--stages"

# Completes a stage when the key is pressed: `shtab.cmd` would ask zsh once, when the script is loaded
_LIST_STAGES = f"mlxflow completion {_STAGES_OPTION} 2>/dev/null"
_STAGES = {
    "bash": "_mlxflow_stages",
    "zsh": "_mlxflow_stages",
    "fish": f"({_LIST_STAGES})",
    "preamble": {
        "bash": f'_mlxflow_stages() {{ compgen -W "$({_LIST_STAGES})" -- "$1"; }}\n'
        'COMP_WORDBREAKS="${COMP_WORDBREAKS//:/}"  # a variant such as quantize:q4 is one word',
        "zsh": f'_mlxflow_stages() {{ compadd -- ${{(f)"$({_LIST_STAGES})"}} }}',
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow completion`."""
    loads = "; ".join(f"{shell}: {command}" for shell, command in SHELLS.items())
    parser.add_argument("shell", nargs="?", default="", metavar="SHELL", help=f"load the script by: {loads}")
    # called by the scripts
    parser.add_argument(_STAGES_OPTION, action="store_true", help="print the stages of this folder's workflow instead")


def run(parsed: argparse.Namespace) -> None:
    """Print the script, or the names of the stages.

    Raises:
        CallError: the shell is not supported.
    """
    if parsed.stages:
        terminal.show(*_stage_names(Path(layout.WORKFLOW)))
        return
    if parsed.shell not in SHELLS:
        shown = f"{parsed.shell}: " if parsed.shell else ""
        raise CallError(f"mlxflow completion: {shown}expected one of {', '.join(SHELLS)}. Name your shell.")
    terminal.write(script(parsed.shell))


def script(shell: str) -> str:
    """Return the script of a shell."""
    import shtab

    from mlxflow.cli.command import whole_parser

    parser = whole_parser()
    for verb, action in _arguments(parser):
        _set_completion(verb, action)
    made: str = shtab.complete(parser, shell)
    return f"{made.rstrip()}\n"


def _arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Yield every verb's name with each of its arguments."""
    (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for verb, inner in verbs.choices.items():
        yield from ((verb, action) for action in inner._actions)


def _set_completion(verb: str, action: Any) -> None:
    """Set what an argument is completed with: stages, files, or a list of names."""
    import shtab

    from mlxflow.cli.init import TEMPLATES

    if action.dest in ("stage", "stages") and action.nargs != 0:
        action.complete = _STAGES
    elif action.type is user_path or (verb == "compare" and not action.option_strings):
        action.complete = shtab.FILE
    elif action.dest == "shell":
        action.choices = list(SHELLS)
    elif action.dest == "template":
        action.choices = list(TEMPLATES)


def _stage_names(path: Path) -> list[str]:
    """Return every stage, variant and group of variants of a workflow file; none if it has mistakes."""
    from mlxflow.workflow.loader import load_workflow

    try:
        stages = load_workflow(path).stages
    except UserError:
        return []
    return list(dict.fromkeys(name for stage in stages for name in (stage.name, stage.task)))
