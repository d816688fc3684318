"""Gradient checkpointing: activations of some layers are recomputed in the backward pass instead of being kept."""

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import patching


@contextmanager
def recomputed(model: nn.Module, *, every: int) -> Iterator[None]:
    """Checkpoint every N-th layer until the block ends: it keeps only its inputs for the backward pass.

    Each such layer gets a subclass of its class; parameters keep their names, other layers of the same class and other
    models are not touched.

    Args:
        model: its layers are the attribute `layers`.
        every: N; 1 for each layer, 0 for none.
    """
    chosen: list[nn.Module] = list(model.layers)[::every] if every else []
    changes = [(layer, _recomputing(cast("Hashable", type(layer)))) for layer in chosen]
    with patching.layer_classes(changes, by=__name__):
        yield


@functools.cache
def _recomputing(plain: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        # Only arguments that may have a gradient go through `mx.checkpoint`; masks, arrays or strings, do not.
        places = [place for place, value in enumerate(arguments) if _is_floating(value)]

        def inner(parameters: Any, *arrays: mx.array) -> Any:
            self.update(parameters)
            given = list(arguments)
            for place, array in zip(places, arrays, strict=True):
                given[place] = array
            return plain.__call__(self, *given, **named)

        return mx.checkpoint(inner)(self.trainable_parameters(), *(arguments[place] for place in places))

    return type(f"Recomputed{plain.__name__}", (plain,), {"__call__": call})


def _is_floating(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
