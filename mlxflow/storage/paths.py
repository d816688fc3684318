"""Convert paths in a workflow file to paths on the disk, and paths on the disk to printable text.

A path may begin with `~` and contain `$VAR` or `${VAR}`. It is relative to the workflow's folder unless absolute, and
may lead out of that folder. Only text written by the user is expanded, never names found on the disk.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})", re.ASCII)


def as_on_disk(name: str) -> str:
    """Convert a name in a UTF-8 file to Python's form of file names, for any encoding of the locale."""
    return name if name.isascii() else os.fsdecode(name.encode(errors="surrogateescape"))


def as_text(name: str) -> str:
    """Convert a name found on the disk to its UTF-8 text, for any encoding of the locale."""
    return name if name.isascii() else os.fsencode(name).decode(errors="surrogateescape")


def expand(name: str) -> str:
    """Return a path with `~` and environment variables replaced; unset variables are kept."""
    return os.path.expandvars(os.path.expanduser(as_on_disk(name)))  # noqa: PTH111 - pathlib refuses an unknown user


def locate(name: str, root: Path) -> Path:
    """Return the location of a path in a workflow file.

    Args:
        name: as written in the workflow file.
        root: the workflow's folder.
    """
    return root / expand(name)


def unset_variables(name: str) -> list[str]:
    """Return the unset environment variables in a path, with their `$`."""
    names = dict.fromkeys(match[1].strip("{}") for match in _VARIABLE.finditer(name))
    return [f"${one}" for one in names if one not in os.environ]


def spelling(name: str) -> tuple[str, str] | None:
    """Return the leading part of a path up to its last expanded element: expanded, and as written.

    Args:
        name: as written in the workflow file.

    Returns:
        None if nothing in it is expanded.
    """
    parts = name.split("/")
    while parts and expand("/".join(parts)) == expand("/".join(parts[:-1])) + f"/{as_on_disk(parts[-1])}":
        parts.pop()
    written = "/".join(parts)
    place = expand(written)
    written = as_on_disk(written)
    return (Path(place).as_posix(), written) if place not in ("", written) else None


def record_name(name: str, spellings: Mapping[str, str]) -> str:
    r"""Return the name under which an input is recorded: equal on every machine, and valid UTF-8.

    Args:
        name: of the file, expanded.
        spellings: leading parts of names, expanded and as written; see `spelling`.

    Returns:
        the name as a user would write it. Bytes that are not UTF-8 are written as `\xff`, and a backslash is doubled.
    """
    for place in sorted(spellings, key=len, reverse=True) if spellings else ():
        if name == place or name.startswith(f"{place.rstrip('/')}/"):
            name = spellings[place] + name[len(place.rstrip("/")) :]
            break
    if name.isascii() and "\\" not in name:
        return name
    return os.fsencode(name.replace("\\", "\\\\")).decode(errors="backslashreplace")


def escape_existing(pattern: str, root: Path) -> str:
    """Return a glob pattern whose leading folders are escaped as far as they exist literally.

    So a folder named `project [v2]` needs no escape. The last part remains a pattern.

    Args:
        pattern: after `expand`; relative to `root` unless absolute.
        root: the folder of relative patterns.
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
    """Return a file's name on one line, with unprintable characters and invalid UTF-8 escaped."""
    if name.isprintable():
        return name
    return "".join(one if one.isprintable() else _escaped(one) for one in name)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # Python's form of bytes in a name that are not UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else character.encode("unicode_escape").decode()


def is_utf8(path: Path) -> bool:
    """Return whether a path is valid UTF-8, which libraries outside of Python require."""
    try:
        as_text(str(path)).encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(path: Path) -> str:
    """Return a path as a user would write it, on one line."""
    relative = os.path.relpath(path)
    return printable(str(path) if relative.startswith("..") else relative)
