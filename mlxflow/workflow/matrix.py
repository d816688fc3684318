"""Expansion of a table with `matrix` and `exclude` into one table for each combination of values.

    [quantize]
    matrix = { bits = [4, 8], group_size = [32, 64] }
    exclude = [{ bits = 8, group_size = 32 }]

makes the variants `bits4-group_size32`, `bits4-group_size64` and `bits8-group_size64`. A dotted key such as
`"model.num_layers"` reaches into a nested table; a variant is named after the key's last part.
"""

import copy
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from mlxflow.storage.toml_tables import Problem

#: The keys of a stage's table that define its variants; they are not passed to the stage.
VARIANT_KEYS = ("name", "matrix", "exclude")


_EXAMPLE = "Write one such as matrix = { bits = [4, 8] }."


def expand_matrix(table: dict[str, Any], problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """Yield a named table for each combination of a table's matrix; the table itself if it has no matrix.

    Args:
        table: as read from TOML; not changed.
        problems: mistakes in the matrix are appended here.
    """
    matrix, excluded = table.get("matrix"), table.get("exclude", [])
    if matrix is None:
        if "exclude" in table:
            problems.append(Problem("exclude", excluded, "there is no matrix to exclude from", "Remove the key."))
        yield {key: value for key, value in table.items() if key != "exclude"}
        return
    before = len(problems)
    problems += _matrix_problems(matrix, excluded, table)
    if len(problems) > before:
        return
    rest = {key: value for key, value in table.items() if key not in ("matrix", "exclude")}
    used: set[int] = set()
    for values in itertools.product(*matrix.values()):
        combination = dict(zip(matrix, values, strict=True))
        matching = [
            index for index, one in enumerate(excluded) if all(combination[key] == value for key, value in one.items())
        ]
        used.update(matching)
        if not matching:
            yield _combined(rest, combination)
    for index, one in enumerate(excluded):
        if index not in used:
            problems.append(Problem("exclude", one, "matches no combination of the matrix", "Remove it or fix it."))


def count(table: object) -> tuple[int, int]:
    """Return an upper bound of a table's number of variants, and the number of values in each, without expanding it.

    Args:
        table: as read from TOML, valid or not.
    """
    matrix = table.get("matrix") if isinstance(table, dict) else None
    lists = [one for one in matrix.values() if isinstance(one, list)] if isinstance(matrix, dict) else []
    excluded = table.get("exclude") if isinstance(table, dict) else None
    # each exclusion is compared with every combination
    compared = len(excluded) if isinstance(excluded, list) and lists else 0
    return math.prod(len(one) for one in lists if one), _num_values(table) + compared


def _num_values(value: object) -> int:
    """Return the number of values in a table, nested ones included."""
    waiting, count = [value], 0
    while waiting:
        one = waiting.pop()
        count += 1
        if isinstance(one, dict | list):
            waiting += one.values() if isinstance(one, dict) else one
    return count


def _matrix_problems(matrix: Any, excluded: Any, table: dict[str, Any]) -> Iterator[Problem]:
    if not isinstance(matrix, dict) or not matrix:
        yield Problem("matrix", matrix, "expected a table of lists", _EXAMPLE)
        return
    for key, values in matrix.items():
        yield from _key_problems(key, values, table)
    if not isinstance(excluded, list) or not all(isinstance(one, dict) and one for one in excluded):
        yield Problem("exclude", excluded, "expected a list of tables", "Write one such as exclude = [{ bits = 8 }].")
        return
    for key in (key for one in excluded for key in one if key not in matrix):
        yield Problem(f"exclude.{key}", msgspec.UNSET, "is no key of the matrix", f"Known: {', '.join(matrix)}.")


def _key_problems(key: str, values: object, table: dict[str, Any]) -> Iterator[Problem]:
    """Yield the mistakes in one key of a matrix."""
    if not isinstance(values, list) or not values or any(isinstance(value, dict | list) for value in values):
        yield Problem(f"matrix.{key}", values, "expected a list of values", _EXAMPLE)
    elif key in VARIANT_KEYS:
        yield Problem(f"matrix.{key}", values, "cannot vary", "Choose a key of the stage.")
    elif key.split(".")[0] in table and "." not in key:
        yield Problem(key, table[key], "is also in the matrix", "Remove one of the two.")


def _combined(rest: dict[str, Any], combination: dict[str, Any]) -> dict[str, Any]:
    table = copy.deepcopy(rest)
    for key, value in combination.items():
        *parents, last = key.split(".")
        inner = table
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    own = "-".join(_word(key, value) for key, value in combination.items())
    table["name"] = f"{rest['name']}-{own}" if "name" in rest else own
    return table


def _word(key: str, value: object) -> str:
    """Return a key and value as part of a name: `bits4`, `mode-affine`, `learning_rate0.001`."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    joined = key.rpartition(".")[2] + ("-" if isinstance(value, str | bool) else "") + text
    return re.sub(r"[^A-Za-z0-9._-]+", "_", joined)
