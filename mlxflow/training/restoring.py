"""Checks that a checkpoint matches a run before it is restored: names, shapes and dtypes. Its file may be foreign."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import msgspec
from mlx.utils import tree_flatten

from mlxflow.training.batch_size import Decision


class _Sizes(msgspec.Struct, forbid_unknown_fields=True):
    size: int
    too_large: int | float | None
    decisions: list[dict[str, Any]]


def facts_problem(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return how the facts of a checkpoint differ in names or types from those of a run; empty if they match.

    Args:
        stored: JSON values by name.
        expected: numbers and booleans by the same names; where one is an integer, the stored one must be at least 0.
    """
    if stored.keys() != expected.keys():
        return "other facts than this version keeps"
    for name, like in expected.items():
        value = stored[name]
        kinds = bool if isinstance(like, bool) else int | float
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            return f"{name} is no number" if kinds is not bool else f"{name} is neither true nor false"
        if isinstance(like, int) and not 0 <= value < 2**63:
            return f"{name} is out of range"
    return ""


def sizes_problem(stored: object) -> str:
    """Return what is wrong with a stored state of `BatchSizes`; empty if nothing is."""
    try:
        sizes = msgspec.convert(stored, _Sizes)
        for decision in sizes.decisions:
            msgspec.convert([decision.get(name) for name in Decision._fields], Decision)
    except msgspec.ValidationError as error:
        return f"its batch sizes: {error}"
    return "" if sizes.size > 0 and sizes.decisions else "its batch sizes are missing"


def arrays_problem(stored: Mapping[str, mx.array], expected: Any) -> str:
    """Return how arrays differ in names, shapes or dtypes from those of a tree; empty if they match.

    The dtype of `partial`, the sums of an interrupted update, is not compared: it depends on how they were computed.
    """
    expected_arrays = dict(tree_flatten(expected))
    if different := sorted(expected_arrays.keys() ^ stored.keys()):
        return f"{different[0]} is {'missing' if different[0] in expected_arrays else 'not of this run'}"
    for name, array in expected_arrays.items():
        stored_array = stored[name]
        if stored_array.shape != array.shape or (stored_array.dtype != array.dtype and not name.startswith("partial.")):
            return f"{name} is {stored_array.dtype} {list(stored_array.shape)}, not {array.dtype} {list(array.shape)}"
    return ""
