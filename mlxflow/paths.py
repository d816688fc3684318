"""How a path in a workflow file becomes a place on the disk, and a place on the disk a line of text.

A path may begin with `~` and hold `$VAR` or `${VAR}`. It is relative to the workflow's folder unless it is absolute; it
may lead out of that folder. Only what a user wrote is expanded, never a name that was found on the disk.
"""

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})", re.ASCII)


def expand(name: str) -> str:
    """Return a path as written with `~` and environment variables replaced; a variable that is not set stays."""
    return os.path.expandvars(os.path.expanduser(name))  # noqa: PTH111 - pathlib refuses an unknown user


def locate(name: str, root: Path) -> Path:
    """Return where a path as written leads.

    Args:
        name: as written in the workflow file.
        root: the workflow's folder.
    """
    return root / expand(name)


def unset_variables(name: str) -> list[str]:
    """Return the environment variables that a path names and that are not set, with their `$`."""
    names = dict.fromkeys(match[1].strip("{}") for match in _VARIABLE.finditer(name))
    return [f"${one}" for one in names if one not in os.environ]


def escape_existing(pattern: str, root: Path) -> str:
    """Return a glob pattern whose leading folders are taken literally as far as they exist under these very names.

    So a folder called `project [v2]` needs no escape. The last part stays a pattern.

    Args:
        pattern: after `expand`; relative to `root` unless absolute.
        root: where relative patterns begin.
    """
    import glob

    folders, slash, last = pattern.rpartition("/")
    parts = folders.split("/") if slash else []
    literal = ""
    for number, part in enumerate(parts):
        if not os.path.isdir(root / f"{literal}{part}/"):  # noqa: PTH112 - a part may be empty
            return glob.escape(literal) + "/".join([*parts[number:], last])
        literal += f"{part}/"
    return glob.escape(literal) + last


def printable(name: str) -> str:
    """Return a file's name on one line: what cannot be printed is written as Python would escape it."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )
