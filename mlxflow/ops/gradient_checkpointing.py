"""Gradient checkpointing: activations of some layers are recomputed in the backward pass instead of being kept.

Within a recomputed layer the feed-forward part goes over the tokens in chunks, in both passes, so that its activations,
the widest of a layer, do not grow with the length of the rows.
"""

import functools
import itertools
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import patching
from mlxflow.ops.token_chunks import by_chunks, drops_out, is_token_wise


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
    wide = [part for layer in chosen for part in layer.children().values() if is_token_wise(part)]
    changes += [(part, by_chunks(cast("Hashable", type(part)))) for part in wide]
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
            with _repeated_dropout(key):
                return plain.__call__(self, *given, **named)

        key = mx.random.randint(0, 1 << 31, (2,)).astype(mx.uint32) if drops_out(self) else None
        return mx.checkpoint(inner)(self.trainable_parameters(), *(arguments[place] for place in places))

    return type(f"Recomputed{plain.__name__}", (plain,), {"__call__": call})


@contextmanager
def _repeated_dropout(key: mx.array | None) -> Iterator[None]:
    """Let dropout draw from a key: `mx.checkpoint` runs a layer twice, and MLX's random state gives another mask then.

    Args:
        key: of a layer's random numbers, (2,); None to leave dropout as it is.
    """
    if key is None:
        yield
        return
    numbers = itertools.count()

    def dropped(layer: Any, x: mx.array) -> mx.array:
        if layer._p_1 == 1 or not layer.training:
            return x
        own = key + mx.array([0, next(numbers)], mx.uint32)
        kept = mx.random.bernoulli(layer._p_1, x.shape, key=own)
        return (kept * x) * (1 / float(layer._p_1))

    with patching.attributes((nn.Dropout, "__call__", dropped), by=__name__):
        yield


def _is_floating(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
