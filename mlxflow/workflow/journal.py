"""The format of doit's state: a line of JSON for each finished stage, with the record of its run; the last one counts.

doit's backend (`mlxflow.tasks.doit_backend`) appends the lines; other modules read the last run of a stage here.
"""

from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.storage import state_files
from mlxflow.storage.paths import printable
from mlxflow.storage.state_files import InvalidStateError
from mlxflow.workflow.records import check_values

#: The key under which doit keeps the record of a stage's last run, and the one of a stage that it was told to ignore.
VALUES, IGNORED = "_values_:", "ignore:"

#: The keys that are kept; every other one is the path of an input as doit sees it.
KEPT_KEYS = frozenset({VALUES, "result:", "checker:", IGNORED})


class Contents(NamedTuple):
    """What a journal holds.

    Attributes:
        entries: what is kept of each task.
        num_lines: how many lines the file has.
        is_torn: whether its last line has no end.
        damage: by line or task, why it is not valid.
    """

    entries: dict[str, dict[str, Any]]
    num_lines: int
    is_torn: bool
    damage: dict[str, str]


def parse(data: bytes) -> Contents:
    """Return what the bytes of a journal hold; a line that is not valid counts as absent, a torn last one too."""
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
    """Return the record of each stage's last run, as far as it is valid; none where there is no journal."""
    try:
        entries = parse(state_files.read_bytes(str(path))).entries
    except FileNotFoundError:
        return {}
    except InvalidStateError as error:
        state_files.say_ignored(path, error, "Every stage is judged by its own report.")
        return {}
    return {task: entry[VALUES] for task, entry in entries.items() if entry.get(VALUES)}


def _read_line(line: bytes, damage: dict[str, str]) -> tuple[str, dict[str, Any] | None]:
    """Return a task and its record, None where it was dropped; a record that is not valid is dropped, too.

    Args:
        line: of the journal.
        damage: by task, why its record is not valid; here it is noted, or forgotten where a valid one follows.

    Raises:
        InvalidStateError: the line is about no task.
    """
    entry = state_files.parse_json(line)
    if not isinstance(entry, dict) or not isinstance(task := entry.get("task"), str) or "record" not in entry:
        raise InvalidStateError("no task with its record")
    record = entry["record"]
    damage.pop(shown := f"the record of {printable(task)}", None)
    if record is None:
        return task, None
    try:
        return task, _checked(record)
    except InvalidStateError as error:
        damage[shown] = str(error)
        return task, None


def _checked(record: object) -> dict[str, Any]:
    """Return what a record holds of the keys that are kept.

    Raises:
        InvalidStateError: one of them has no valid value.
    """
    if not isinstance(record, dict):
        raise InvalidStateError("no table")
    kept = {key: value for key, value in record.items() if key in KEPT_KEYS}
    for key, value in kept.items():
        if key == VALUES:
            check_values(value)
        elif not isinstance(value, str | None):
            raise InvalidStateError(f"{key} expected text")
    return kept
