"""Read and parse a workflow file in bounded time and memory for any content."""

import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.messages.errors import WorkflowError
from mlxflow.messages.os_errors import advise_on
from mlxflow.storage import paths, toml_text
from mlxflow.storage.toml_text import MAX_WORKFLOW_BYTES
from mlxflow.workflow import matrix

#: The most variants that all stages of a file may have together, and the most values in all their tables.
MAX_VARIANTS, MAX_VALUES = 1000, 100_000


class WorkflowText(NamedTuple):
    """A workflow file.

    Attributes:
        text: its content.
        tables: its tables.
    """

    text: str
    tables: dict[str, Any]


def read(path: Path, shown: str, data: bytes | None = None) -> WorkflowText:
    """Return the content and the tables of a workflow file.

    Args:
        path: the file.
        shown: its name, for the messages.
        data: its content; None to read it.

    Raises:
        WorkflowError: it cannot be read, is too long or no valid TOML, or has too many variants or values.
    """
    if not paths.is_utf8(path):
        raise WorkflowError(
            f"{shown}: its folder's name is not UTF-8, which MLX cannot open. Rename the folder, "
            "or call this from inside."
        )
    data = _read_bytes(path, shown) if data is None else data
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise WorkflowError(f"{shown}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    try:
        document = toml_text.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise WorkflowError(_toml_error_message(shown, str(error), len(text.rstrip().splitlines()))) from error
    _refuse_too_many(document, shown)
    return WorkflowText(data.decode(), document)


def _read_bytes(path: Path, shown: str) -> bytes:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise WorkflowError(f"{shown}: is no regular file. Name a TOML file.")
            data = file.read(MAX_WORKFLOW_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise WorkflowError(f"{shown}: missing. Write one (an empty file works), or name another.") from error
    except OSError as error:
        advice = advise_on(error, "Fix it, or name another")
        raise WorkflowError(f"{shown}: cannot be read ({error.strerror}). {advice}.") from error
    if len(data) > MAX_WORKFLOW_BYTES:
        raise WorkflowError(
            f"{shown}: has more than {MAX_WORKFLOW_BYTES:,} bytes. "
            "Name folders or globs instead of single files, or split it."
        )
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Open a file without blocking on a pipe, which is then refused as no regular file."""
    return os.open(path, flags | os.O_NONBLOCK)


def _toml_error_message(shown: str, message: str, last_line: int) -> str:
    match = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", message)
    if match:
        return f"{shown}:{match[2]}:{match[3]}: not valid TOML ({match[1]}). Fix the line."
    if message.endswith(("levels", "deeply", "digits")):  # errors without a position
        return f"{shown}: not valid TOML ({message}). Fix the file."
    reason = message.removesuffix(" (at end of document)")
    return f"{shown}:{last_line}: not valid TOML ({reason}). Fix the line or one before it."


def _refuse_too_many(document: dict[str, Any], shown: str) -> None:
    """Refuse more variants, or values in them, than can be checked within a second.

    Raises:
        WorkflowError: names the table with the most of them.
    """
    counts = {name: [matrix.count(one) for one in _tables(table)] for name, table in document.items()}
    totals = {name: sum(count for count, _ in counts[name]) for name in document if _varies(document[name])}
    if sum(totals.values()) > MAX_VARIANTS:
        name = max(totals, key=lambda one: totals[one])
        raise WorkflowError(
            f"{shown}: {paths.printable(name)}: makes {totals[name]:,} variants: expected at most {MAX_VARIANTS:,} "
            "of all stages. Shorten the lists of its matrix, or split the file."
        )
    values = {name: sum(count * size for count, size in sizes) for name, sizes in counts.items()}
    if sum(values.values()) > MAX_VALUES:
        name = max(values, key=lambda one: values[one])
        raise WorkflowError(
            f"{shown}: {paths.printable(name)}: has {values[name]:,} values in all its variants: expected at most "
            f"{MAX_VALUES:,} of all stages. Shorten its lists or its matrix, or split the file."
        )


def _varies(table: object) -> bool:
    return isinstance(table, list) or (isinstance(table, dict) and "matrix" in table)


def _tables(table: object) -> list[object]:
    return table if isinstance(table, list) else [table]
