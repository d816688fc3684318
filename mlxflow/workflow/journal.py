"""The journal of finished stages: a JSON line for each run with its record; the last line of a stage is valid.

doit's backend (`mlxflow.tasks.doit_backend`) appends the lines; other modules read the records here.
"""

from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.storage import state_files
from mlxflow.storage.paths import printable
from mlxflow.storage.state_files import InvalidStateError
from mlxflow.workflow.records import check_values

#: doit's keys for the record of a stage's last run, and for a stage that is ignored.
VALUES, IGNORED = "_values_:", "ignore:"

#: The keys that are stored; doit's other keys are paths of inputs.
KEPT_KEYS = frozenset({VALUES, "result:", "checker:", IGNORED})


class Contents(NamedTuple):
    """The content of a journal.

    Attributes:
        entries: the stored keys of each task.
        num_lines: lines of the file.
        is_torn: whether the last line is incomplete.
        damage: by line or task, why it is not valid.
    """

    entries: dict[str, dict[str, Any]]
    num_lines: int
    is_torn: bool
    damage: dict[str, str]


def parse(data: bytes) -> Contents:
    """Parse a journal; an invalid line, or an incomplete last one, is ignored."""
    is_torn = not data.endswith(b"\n")
    lines = data.splitlines()
    entries: dict[str, dict[str, Any]] = {}
    damage: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            task, entry = _read_line(line, damage)
        except InvalidStateError as error:
            if not (is_torn and number == len(lines)):
                damage[f"line {number}"] = str(error)
            continue
        entries.pop(task, None)
        if entry is not None:
            entries[task] = entry
    return Contents(entries, len(lines), is_torn, damage)


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Return the valid records of the stages' last runs by task; empty without a journal."""
    try:
        entries = parse(state_files.read_bytes(str(path))).entries
    except FileNotFoundError:
        return {}
    except InvalidStateError as error:
        state_files.say_ignored(path, error, "Every stage is judged by its own report.")
        return {}
    return {task: entry[VALUES] for task, entry in entries.items() if entry.get(VALUES)}


def _read_line(line: bytes, damage: dict[str, str]) -> tuple[str, dict[str, Any] | None]:
    """Return a task and its record; None for a removed or an invalid record.

    Args:
        line: of the journal.
        damage: by task, why its record is not valid; updated.

    Raises:
        InvalidStateError: the line names no task.
    """
    entry = state_files.parse_json(line)
    if not isinstance(entry, dict) or not isinstance(task := entry.get("task"), str) or "record" not in entry:
        raise InvalidStateError("no task with its record")
    record = entry["record"]
    if damage:
        damage.pop(_record_of(task), None)
    if record is None:
        return task, None
    try:
        return task, _checked(record)
    except InvalidStateError as error:
        damage[_record_of(task)] = str(error)
        return task, None


def _record_of(task: str) -> str:
    return f"the record of {printable(task)}"


def _checked(record: object) -> dict[str, Any]:
    """Return the stored keys of a record.

    Raises:
        InvalidStateError: a value is not valid.
    """
    if not isinstance(record, dict):
        raise InvalidStateError("no table")
    stored = {key: value for key, value in record.items() if key in KEPT_KEYS}
    for key, value in stored.items():
        if key == VALUES:
            check_values(value)
        elif not isinstance(value, str | None):
            raise InvalidStateError(f"{key} expected text")
    return stored
