"""How a path in a workflow file becomes a place on the disk, and a place on the disk a line of text.

A path may begin with `~` and hold `$VAR` or `${VAR}`. It is relative to the workflow's folder unless it is absolute; it
may lead out of that folder. Only what a user wrote is expanded, never a name that was found on the disk.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})", re.ASCII)


def as_on_disk(name: str) -> str:
    """Return a name as written in a UTF-8 file as Python spells it on the disk, whatever the locale's encoding is."""
    return name if name.isascii() else os.fsdecode(name.encode(errors="surrogateescape"))


def as_text(name: str) -> str:
    """Return a name as found on the disk as UTF-8 has it, whatever the locale's encoding is."""
    return name if name.isascii() else os.fsencode(name).decode(errors="surrogateescape")


def expand(name: str) -> str:
    """Return a path as written with `~` and environment variables replaced; a variable that is not set stays."""
    return os.path.expandvars(os.path.expanduser(as_on_disk(name)))  # noqa: PTH111 - pathlib refuses an unknown user


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


def spelling(name: str) -> tuple[str, str] | None:
    """Return the leading part of a path up to the last thing in it that is expanded: expanded, and as written.

    Args:
        name: as written in the workflow file.

    Returns:
        None where nothing in it is expanded.
    """
    parts = name.split("/")
    while parts and expand("/".join(parts)) == expand("/".join(parts[:-1])) + f"/{as_on_disk(parts[-1])}":
        parts.pop()
    written = "/".join(parts)
    place = expand(written)
    written = as_on_disk(written)
    return (Path(place).as_posix(), written) if place not in ("", written) else None


def record_name(name: str, spellings: Mapping[str, str]) -> str:
    r"""Return the name under which an input is recorded: the same on every machine, and valid UTF-8.

    Args:
        name: of the file, expanded.
        spellings: leading parts of names, expanded, and what was written for each; see `spelling`.

    Returns:
        the name as a user would write it. Bytes that are no UTF-8 are written as `\xff`, and a backslash as two.
    """
    for place in sorted(spellings, key=len, reverse=True) if spellings else ():
        if name == place or name.startswith(f"{place.rstrip('/')}/"):
            name = spellings[place] + name[len(place.rstrip("/")) :]
            break
    if name.isascii() and "\\" not in name:
        return name
    return os.fsencode(name.replace("\\", "\\\\")).decode(errors="backslashreplace")


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
    """Return a file's name on one line: what cannot be printed is escaped as in Python, bytes that are no UTF-8 too."""
    if name.isprintable():
        return name
    return "".join(one if one.isprintable() else _escaped(one) for one in name)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # as Python reads bytes of a name that are no UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()


def is_utf8(path: Path) -> bool:
    """Return whether a path is valid UTF-8, as libraries in other languages than Python want it."""
    try:
        as_text(str(path)).encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(path: Path) -> str:
    """Return a path as a user would write it, on one line."""
    relative = os.path.relpath(path)
    return printable(str(path) if relative.startswith("..") else relative)
