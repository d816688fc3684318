"""The record of a stage's last run: its fields, their types, and checks when a record is read.

Written without a validation library, whose import would slow down a no-op `doit`.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from mlxflow.storage.state_files import InvalidStateError

#: Key in the values of a task after `doit forget`.
FORGOTTEN = "forgotten"

_DEEPEST = 32
_LARGEST_INTEGER = 2**64
_LARGEST_FILE_BYTES = 2**63
_LONGEST_SECONDS = 1e10
_MOST_THREADS = 2**20
_DIGEST = re.compile(r"[0-9a-f]{1,64}")


def are_settings(value: object) -> bool:
    """Return whether a value is a table of tables, lists, texts and numbers, as in the lock file."""
    return isinstance(value, dict) and _is_setting(value, _DEEPEST)


def _is_setting(value: object, deepest: int) -> bool:
    match value:
        case bool() | str():
            return True
        case int():
            return abs(value) < _LARGEST_INTEGER
        case float():
            return not math.isnan(value)
        case dict():
            return deepest > 0 and all(isinstance(k, str) and _is_setting(v, deepest - 1) for k, v in value.items())
        case list():
            return deepest > 0 and all(_is_setting(one, deepest - 1) for one in value)
        case _:
            return False


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def is_output(value: object) -> bool:
    """Return whether a value is the size and the content digest of a file."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    size, content = value
    return type(size) is int and 0 <= size < _LARGEST_FILE_BYTES and _is_digest(content)


def is_seconds(value: object) -> bool:
    """Return whether a value is a duration as a record holds it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LONGEST_SECONDS


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST_THREADS


_Check = Callable[[object], bool]


def _table_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(isinstance(k, str) and check(v) for k, v in value.items())


#: For each field: whether it is required, its check, and what is expected. Other fields are not imported.
_FIELDS: dict[str, tuple[bool, _Check, str]] = {
    "settings": (True, are_settings, "a table of settings"),
    "inputs": (True, _table_of(_is_digest), "a digest for each name"),
    "outputs": (True, lambda value: bool(value) and _table_of(is_output)(value), "[bytes, digest] for each name"),
    "seconds": (False, is_seconds, "a number of seconds"),
    "device": (False, _is_text, "text"),
    "commit": (False, _is_text, "text"),
    "threads": (False, _is_count, "a number of threads"),
    "ranks": (False, _is_text, "text"),
}


def check_values(values: object) -> None:
    """Check a record of a stage. One without outputs, of an earlier version or forgotten, may lack other fields, too.

    Raises:
        InvalidStateError: it is not valid; the message names the field.
    """
    if not isinstance(values, dict):
        raise InvalidStateError("no table")
    for name, (is_required, check, expected) in _FIELDS.items():
        if name in values:
            if not check(values[name]):
                raise InvalidStateError(f"{name}: expected {expected}")
        elif is_required and "outputs" in values:
            raise InvalidStateError(f"{name}: missing")


def read_values(values: object) -> dict[str, Any]:
    """Return the known fields of a complete record from another machine; unknown fields are left out.

    Raises:
        InvalidStateError: it is not a complete, valid record.
    """
    check_values(values)
    if not isinstance(values, dict) or "outputs" not in values:
        raise InvalidStateError("outputs: missing")
    return {name: values[name] for name in _FIELDS if name in values}


def is_complete(values: dict[str, Any]) -> bool:
    """Return whether a record has outputs; one of an earlier version, or after `doit forget`, has none."""
    return "outputs" in values
