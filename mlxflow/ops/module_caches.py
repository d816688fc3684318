"""Arrays that modules keep beside their parameters, such as a scale that is derived from a weight once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_NOTHING = object()


@contextmanager
def restored_caches(model: nn.Module) -> Iterator[None]:
    """Restore all attributes of a model's modules whose names begin with an underscore when the block ends.

    Within the trace of a compiled function a module may keep an array of the trace, which has no value outside of it.

    Args:
        model: its modules remain the same in the block.
    """
    before = [(module, _arrays(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, arrays, others in before:
            for key, value in _arrays(module).items():
                earlier = arrays.get(key, _NOTHING)
                if earlier is not value:
                    _set(module, key, others.get(key, _NOTHING) if earlier is _NOTHING else earlier)


def _arrays(module: nn.Module) -> dict[str, Any]:
    """Return the arrays that a module keeps beside its parameters."""
    return {key: value for key, value in module.items() if key.startswith("_") and isinstance(value, mx.array)}


def _set(module: nn.Module, key: str, value: Any) -> None:
    if value is _NOTHING:
        delattr(module, key)
    else:
        setattr(module, key, value)
