"""The verbs of `mlxflow` and of `doit` with their arguments, from argparse and doit's command classes."""

import argparse
import importlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxflow.cli.command import VERBS
from tools.docs import markdown

#: Commands of doit that stages refuse.
_REFUSED = ("reset-dep", "strace")

_INTRODUCTION = """\
`mlxflow build` and `doit` build the same graph with the same locks and state; `doit` needs a `dodo.py` in the folder.
`doit` without a verb is `doit run`. Each verb prints its own help: `mlxflow VERB --help`, `doit help VERB`. Exit codes:
[messages and exit codes](messages-and-exit-codes.md)."""

_COMMON = """\
Every verb of `doit` also takes `workflow=PATH`: another workflow file, with its artifacts beside it."""


def command_page(repository: Path) -> str:
    """Return the page of all verbs.

    Args:
        repository: the folder whose pyproject.toml names the commands of doit.
    """
    doit_verbs = _doit_verbs(repository)
    return markdown.page(
        "Commands",
        _INTRODUCTION,
        "## `mlxflow`",
        markdown.table(("verb", "does"), ((f"[`{name}`](#mlxflow-{name})", about) for name, about in VERBS.items())),
        "## `doit`",
        markdown.table(
            ("verb", "does"), ((f"[`{name}`](#doit-{name})", one.doc_purpose) for name, one in doit_verbs.items())
        ),
        _COMMON,
        *(part for name, about in VERBS.items() for part in _mlxflow_verb(name, about)),
        *(part for name, one in doit_verbs.items() for part in _doit_verb(name, one)),
    )


def _mlxflow_verb(name: str, about: str) -> Iterable[str]:
    parser = argparse.ArgumentParser(prog=f"mlxflow {name}", add_help=False)
    importlib.import_module(f"mlxflow.cli.{name.replace('-', '_')}").add_arguments(parser)
    yield f"### `mlxflow {name}`"
    yield f"{_sentence(about)}"
    if rows := [_argument(action) for action in parser._actions if action.help is not argparse.SUPPRESS]:
        yield markdown.table(("argument", "is"), rows)


def _argument(action: argparse.Action) -> tuple[str, str]:
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices is not None and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    shown = value if isinstance(value, str) else " ".join(value)
    many = {"*": f"[{shown} ...]", "+": f"{shown} [{shown} ...]", "?": f"[{shown}]"}.get(str(action.nargs), shown)
    call = ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {many}")
    return f"`{call.strip()}`", (action.help or "").replace("%%", "%") % _defaults(action)


def _defaults(action: argparse.Action) -> Mapping[str, Any]:
    return {"default": action.default, "prog": "mlxflow"}


def _doit_verbs(repository: Path) -> dict[str, Any]:
    """Return the command classes of doit that work on stages, by name."""
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    verbs = {}
    for name, place in sorted(project["entry-points"]["doit.COMMAND"].items()):
        module, _, attribute = place.partition(":")
        if name not in _REFUSED:
            verbs[name] = getattr(importlib.import_module(module), attribute)
    return verbs


def _doit_verb(name: str, command: Any) -> Iterable[str]:
    yield f"### `doit {name}`"
    yield _sentence(command.doc_purpose)
    if usage := (command.doc_usage or "").strip():
        yield f"`doit {name} {usage}`"
    rows = [_option(one) for one in command.cmd_options if one.get("help")]
    if rows:
        yield markdown.table(("option", "is"), rows)


def _option(option: Mapping[str, Any]) -> tuple[str, str]:
    value = "" if option.get("type") is bool else f" {option['name'].upper()}"
    names = [f"-{option['short']}"] if option.get("short") else []
    names += [f"--{option['long']}"] if option.get("long") else []
    return f"`{', '.join(names)}{value}`", option["help"].replace("%(default)s", str(option.get("default")))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."
