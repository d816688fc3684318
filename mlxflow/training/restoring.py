"""Whether a checkpoint holds what a run can go on from; one that somebody else made may hold anything."""

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


def unlike_facts(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return how the facts of a checkpoint differ in names or types from those of a run; empty where they do not.

    Args:
        stored: JSON values by name.
        expected: numbers and booleans by the same names; where they are whole numbers none below 0 is taken.
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


def unlike_sizes(stored: object) -> str:
    """Return what is wrong with a state of `BatchSizes`; empty where nothing is."""
    try:
        sizes = msgspec.convert(stored, _Sizes)
        for decision in sizes.decisions:
            msgspec.convert([decision.get(name) for name in Decision._fields], Decision)
    except msgspec.ValidationError as error:
        return f"its batch sizes: {error}"
    return "" if sizes.size > 0 and sizes.decisions else "its batch sizes are none"


def unlike_arrays(stored: Mapping[str, mx.array], expected: Any) -> str:
    """Return how arrays differ in names, shapes or types from those of a tree; empty where they do not.

    Sums of an update that was cut short, `partial`, are of the type that they were computed in, which nothing says.
    """
    wanted = dict(tree_flatten(expected))
    if different := sorted(wanted.keys() ^ stored.keys()):
        return f"{different[0]} is {'missing' if different[0] in wanted else 'not of this run'}"
    for name, array in wanted.items():
        found = stored[name]
        if found.shape != array.shape or (found.dtype != array.dtype and not name.startswith("partial.")):
            return f"{name} is {found.dtype} {list(found.shape)}, not {array.dtype} {list(array.shape)}"
    return ""
