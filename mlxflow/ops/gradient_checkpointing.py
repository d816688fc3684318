"""Gradient checkpointing: activations of some layers are recomputed in the backward pass instead of being kept.

Within a recomputed layer the feed-forward part goes over the tokens in chunks, in both passes, so that its activations,
the widest of a layer, do not grow with the length of the rows.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxflow.ops import patching
from mlxflow.ops.custom_function import CustomFunction, custom_function, disregard
from mlxflow.ops.token_chunks import by_chunks, drops_out, is_token_wise


@contextmanager
def recomputed(model: nn.Module, *, every: int, segment: int = 1) -> Iterator[None]:
    """Checkpoint every N-th layer until the block ends: it keeps only its inputs for the backward pass.

    Each such layer gets a subclass of its class; parameters keep their names, other layers of the same class and other
    models are not touched.

    Args:
        model: its layers are the attribute `layers`.
        every: N; 1 for each layer, 0 for none.
        segment: layers in a row that keep only the input of the first. Those before the last are computed twice
            in the backward pass. Layers that do more than pass one array on are segments of their own.
    """
    chosen: list[nn.Module] = list(model.layers)[::every] if every else []
    segments = _Segments(segment)
    classes = {kind: _recomputing(kind, segments) for kind in map(type, chosen)}
    changes = [(layer, classes[type(layer)]) for layer in chosen]
    wide = [part for layer in chosen for part in layer.children().values() if is_token_wise(part)]
    changes += [(part, by_chunks(cast("Hashable", type(part)))) for part in wide]
    try:
        with patching.layer_classes(changes, by=__name__):
            yield
    finally:
        segments.end()


class _LayerCall(NamedTuple):
    """A layer in a segment.

    Attributes:
        function: of its inputs and weights; keeps nothing but them for its gradient.
        weights: that are trained.
        restore: gives them back to the layer, which holds those of a trace otherwise.
    """

    function: CustomFunction
    weights: list[mx.array]
    restore: Callable[[], object]


class _Segments:
    """The segment that the layers of a forward pass are in.

    Args:
        most: layers of a segment.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.end()

    def end(self) -> None:
        """Begin a new segment with the next layer."""
        self._parts: list[_LayerCall] = []
        self._input: Any = None
        self._result: Any = None

    def call(self, inputs: list[mx.array], part: _LayerCall) -> Any:
        """Return the result of a layer, which joins the segment if its only input is the result of the layer before."""
        is_next = len(inputs) == 1 and inputs[0] is self._result and len(self._parts) < self._most
        parts = [*self._parts, part] if is_next else [part]
        given = [self._input] if is_next else inputs
        if is_next:
            disregard(self._result)  # of the layer before
        function = _joined([one.function for one in parts], [len(one.weights) for one in parts])
        result = function(*given, *(weight for one in parts for weight in one.weights))
        for one in parts:
            one.restore()
        if len(inputs) == 1 and isinstance(result, mx.array) and self._most > 1:
            self._parts, self._input, self._result = parts, given[0], result
        else:
            self.end()
        return result


# Stands for an array in the form of a result
_ARRAY = object()


def _joined(functions: list[CustomFunction], num_weights: list[int]) -> CustomFunction:
    """Return the function of layers that follow each other: of the input of the first and the weights of all."""
    if len(functions) == 1:
        return functions[0]

    def forward(x: mx.array, *weights: mx.array) -> mx.array:
        left = list(weights)
        for function, count in zip(functions, num_weights, strict=True):
            x, left = function(x, *left[:count]), left[count:]
        return x

    return _checkpointed(forward, 1)


def _recomputing(plain: type[nn.Module], segments: _Segments) -> type[nn.Module]:
    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        # Arrays that may have a gradient become arguments of what is recomputed, however they were given; what it
        # captures, such as masks, has none
        inputs = _floating((arguments, named))
        key = mx.random.randint(0, 1 << 31, (2,)).astype(mx.uint32) if drops_out(self) else None
        weights: list[tuple[str, mx.array]] = tree_flatten(self.trainable_parameters())

        def inner(*values: mx.array) -> Any:
            left = iter(values)
            given, by_name = _replace_floating((arguments, named), lambda _: next(left))
            self.update(tree_unflatten([(name, next(left)) for name, _ in weights]))
            with _repeated_dropout(key):
                result = plain.__call__(self, *given, **by_name)
            if not isinstance(result, mx.array):  # such as an array and None
                forms[id(self)] = tree_map(lambda leaf: _ARRAY if isinstance(leaf, mx.array) else leaf, result)
                return tuple(_arrays(result))
            return result

        part = _LayerCall(
            _checkpointed(inner, len(inputs)),
            [value for _, value in weights],
            lambda: self.update(tree_unflatten(weights)),
        )
        result = segments.call(inputs, part)
        if id(self) not in forms:
            return result
        left = iter(_arrays(result))
        return tree_map(lambda leaf: next(left) if leaf is _ARRAY else leaf, forms[id(self)])

    forms: dict[int, Any] = {}  # of the results of layers that return more than an array
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
        found: list[mx.array] = mx.vjp(function, mx.depends(values, given), given)[1]
        inputs, weights = found[:num_inputs], found[num_inputs:]
        return *(mx.depends(inputs, weights) if inputs and weights else inputs), *weights

    return checkpointed


def _arrays(tree: Any) -> list[mx.array]:
    """Return the arrays of a layer's result."""
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


def _floating(tree: Any) -> list[mx.array]:
    """Return the arrays of floating-point numbers in the arguments of a layer."""
    found: list[mx.array] = []
    _replace_floating(tree, found.append)
    return found


def _replace_floating(tree: Any, replace: Callable[[mx.array], Any]) -> Any:
    """Return a copy of a tree of dictionaries, lists and tuples in which arrays of floating-point numbers are replaced.

    Args:
        tree: the arguments of a layer; other leaves, such as caches, are kept.
        replace: takes an array and returns what replaces it; called in the order of the tree.
    """
    if isinstance(tree, mx.array):
        return replace(tree) if mx.issubdtype(tree.dtype, mx.floating) else tree
    if type(tree) is dict:
        return {name: _replace_floating(value, replace) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        parts = [_replace_floating(value, replace) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree
