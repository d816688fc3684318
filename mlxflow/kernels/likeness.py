"""What layers have in common that compute the same from their weights."""

from collections.abc import Hashable
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def likeness(value: Any, seen: dict[int, Hashable]) -> Hashable:
    """Return what layers have in common that compute the same from their weights; None for what is no part of a layer.

    Args:
        value: a layer, or what one holds.
        seen: what was returned for the layers of a model so far.
    """
    if isinstance(value, mx.array):
        return (value.shape, value.dtype)
    if isinstance(value, list | tuple):
        return tuple(likeness(one, seen) for one in value)
    if not isinstance(value, dict):
        return None
    if id(value) not in seen:
        held = tuple((key, likeness(one, seen)) for key, one in value.items())
        seen[id(value)] = (type(value), held, settings(value) if isinstance(value, nn.Module) else None)
    return seen[id(value)]


def settings(module: nn.Module) -> Hashable:
    """Return the numbers, truths and texts that a layer holds, by name."""
    return tuple(sorted((key, repr(value)) for key, value in plain_values(module).items()))


def plain_values(module: nn.Module) -> dict[str, Any]:
    """Return the numbers, truths and texts that a layer holds, as they are."""
    return {key: value for key, value in {**module, **vars(module)}.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | None)
