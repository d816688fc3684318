"""Gradient checkpointing: activations of some layers are recomputed in the backward pass instead of being kept.

Within a recomputed layer the feed-forward part goes over the tokens in chunks, in both passes, so that its activations,
the widest of a layer, do not grow with the length of the rows.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.ops import patching
from mlxflow.ops.custom_function import CustomFunction, custom_function
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
        # Only arguments that may have a gradient are kept and get one; masks, arrays or strings, do not.
        places = [place for place, value in enumerate(arguments) if _is_floating(value)]
        key = mx.random.randint(0, 1 << 31, (2,)).astype(mx.uint32) if drops_out(self) else None
        weights: list[tuple[str, mx.array]] = tree_flatten(self.trainable_parameters())

        def inner(*values: mx.array) -> Any:
            arrays, parameters = values[: len(places)], values[len(places) :]
            self.update(tree_unflatten([(name, value) for (name, _), value in zip(weights, parameters, strict=True)]))
            given = list(arguments)
            for place, array in zip(places, arrays, strict=True):
                given[place] = array
            with _repeated_dropout(key):
                return plain.__call__(self, *given, **named)

        inputs = [arguments[place] for place in places]
        result = _checkpointed(inner, len(inputs))(*inputs, *(value for _, value in weights))
        self.update(tree_unflatten(weights))
        return result

    return type(f"Recomputed{plain.__name__}", (plain,), {"__call__": call})


def _checkpointed(function: Callable[..., Any], num_inputs: int) -> CustomFunction:
    """Return a function that keeps nothing but its arguments for its gradient.

    As `mx.checkpoint`, but ordered: it is computed again once the incoming gradients are known, where MLX's waits for
    its results alone, and the gradients of its weights are known before those of its inputs are passed on. Without that
    order MLX begins with other layers before a layer's activations are freed.

    Args:
        function: of inputs and weights; returns an array or several.
        num_inputs: how many of the arguments are inputs.
    """
    checkpointed = custom_function(function)

    @checkpointed.vjp
    def gradients(primals: Any, incoming: Any, _: Any) -> tuple[mx.array, ...]:
        values = list(primals) if isinstance(primals, tuple | list) else [primals]
        given = _arrays(incoming)
        found: list[mx.array] = mx.vjp(lambda *values: _arrays(function(*values)), mx.depends(values, given), given)[1]
        inputs, weights = found[:num_inputs], found[num_inputs:]
        return *(mx.depends(inputs, weights) if inputs and weights else inputs), *weights

    return checkpointed


def _arrays(tree: Any) -> list[mx.array]:
    """Return the arrays of a layer's result; some return None beside an array."""
    return [value for _, value in tree_flatten(tree) if isinstance(value, mx.array)]


@contextmanager
def _repeated_dropout(key: mx.array | None) -> Iterator[None]:
    """Let dropout draw from a key: a layer is run twice, and MLX's random state gives another mask then.

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
