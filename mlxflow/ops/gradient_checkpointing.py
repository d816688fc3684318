"""Gradient checkpointing: some layers' activations are computed anew in the backward pass instead of being held."""

import functools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import patching


@contextmanager
def recomputed(model: nn.Module, *, every: int) -> Iterator[None]:
    """Let every so-manieth layer hold nothing but its inputs for the backward pass, until the block ends.

    Each such layer becomes of a class of its own that inherits from its class; parameters keep their names, other
    layers of the same class and other models are not touched.

    Args:
        model: with its layers in `layers`.
        every: 1 for each layer, 2 for every second one and so on; 0 for none.
    """
    chosen: list[nn.Module] = list(model.layers)[::every] if every else []
    changes = [(layer, _recomputing(cast("Hashable", type(layer)))) for layer in chosen]
    with patching.layer_classes(changes, by=__name__):
        yield


@functools.cache
def _recomputing(plain: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        # Only what may have a gradient is told to the transformation: masks stay the arrays, or words, that they are.
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
