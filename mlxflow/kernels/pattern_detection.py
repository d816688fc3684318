"""Tries layers: what they compute from random inputs tells whether they are one that a kernel could serve."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.kernels import gated_activation, rms_norm, rotary
from mlxflow.kernels.layer_patterns import (
    Block,
    Embedding,
    Fit,
    GatedMLP,
    GatedProduct,
    JoinedMLP,
    Norm,
    Rotary,
    in_order,
    is_product,
)
from mlxflow.kernels.layer_signature import plain_values


class Trial(NamedTuple):
    """What came out of a trial.

    Attributes:
        fit: what the layer is; None for none that a kernel could serve.
        is_lasting: whether it follows from the layer's classes, settings and shapes, whatever its weights are.
    """

    fit: Fit | None
    is_lasting: bool


def may_fit(module: nn.Module) -> bool:
    """Return whether a layer holds what one that could fit holds: two or three linear layers, one array, or nothing.

    One that holds layers and an array of its own does not: what it computes may change with that array.
    """
    within = [value for value in module.values() if isinstance(value, nn.Module)]
    shapes = [value.ndim for key, value in module.items() if isinstance(value, mx.array) and not key.startswith("_")]
    if within and shapes:
        return False
    if len(within) == 4:
        return sum(_is_norm_like(layer) for layer in within) == 2
    if within:
        return len(within) in (2, 3) and all(_input_width(layer) is not None for layer in within)
    return shapes in ([], [1], [2])


def try_layer(module: nn.Module) -> Trial:
    """Try what a layer is that a kernel could serve.

    Args:
        module: as it is trained, evaluated; as before afterwards.
    """
    inner = [name for name, value in module.children().items() if isinstance(value, nn.Module)]
    takes_weights = len(inner) in (2, 3)
    try:
        fit = _try_with(module, inner)
    except RuntimeError:  # for want of memory, maybe
        return Trial(None, False)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        return Trial(None, not takes_weights)
    return Trial(fit, fit is not None or not takes_weights)


def _try_with(module: nn.Module, inner: list[str]) -> Fit | None:
    parameters = tree_flatten(module.parameters())
    if len(inner) != len(module.children()):
        return None
    if len(inner) == 3:
        return _try_mlp(module, inner)
    if len(inner) == 2:
        return _try_joined(module, inner)
    with mx.stream(mx.cpu):  # a GPU takes a while for the first operation of each kind
        if len(inner) == 4:
            return _try_block(module, inner)
        if _is_norm_like(module):
            return _try_norm(module)
        if [(path, value.ndim) for path, value in parameters] == [("weight", 2)]:
            return _try_embedding(module)
        return None if parameters else _try_rotary(module) or _try_product(module)


def _try_norm(module: nn.Module) -> Norm | None:
    before = module.weight
    width = before.size
    x = _sample((3, width), 0) * mx.array([[1.0], [3e-3], [30.0]])
    values = plain_values(module).values()
    candidates = sorted({float(value) for value in values if isinstance(value, float) and 0 <= value < 0.1})
    module.weight = 1 + _sample((width,), 1) * 0.3
    try:
        for eps, offset in itertools.product(candidates, (0.0, 1.0)):
            expected = rms_norm.reference(x, module.weight + offset, eps)
            if _same(module(x), expected):
                return Norm(eps, offset)
    finally:
        module.weight = before
    return None


def _try_block(module: nn.Module, inner: list[str]) -> Block | None:
    """Try a block's own pass with stand-ins for its layers: what it adds to what, and what it hands on to which."""
    norms = [name for name in inner if _is_norm_like(module[name])]
    layers = [name for name in inner if name not in norms]
    fits = {name: _try_norm(module[name]) for name in norms}
    if None in fits.values() or len({module[name].weight.size for name in norms}) > 1:
        return None
    told = [object() for _ in in_order(type(module), *[0] * _places(type(module)))][1:]
    functions = dict(zip(inner, (mx.sin, mx.exp, mx.tanh, mx.square), strict=True))
    handed: dict[str, list[Any]] = {}

    def stand_in(name: str) -> Callable[..., mx.array]:
        def call(x: mx.array, *others: Any) -> mx.array:
            handed[name] = [*others]
            found: mx.array = functions[name](x)
            return found

        return call

    kept, x = {name: module[name] for name in inner}, _sample((2, 8), 0)
    try:
        for name in inner:
            module[name] = stand_in(name)
        found = module(x, *told)
    finally:
        for name in inner:
            module[name] = kept[name]
    for (one, other), (first, second) in itertools.product(
        itertools.permutations(norms), itertools.permutations(layers)
    ):
        h = x + functions[first](functions[one](x))
        is_handed_on = handed.get(first) == told and handed.get(second) == []
        if is_handed_on and _same(found, h + functions[second](functions[other](h))):
            return Block((one, other), (first, second), (cast("Norm", fits[one]), cast("Norm", fits[other])))
    return None


def _places(kind: type[nn.Module]) -> int:
    return len(inspect.signature(kind.__call__).parameters) - 1


def _is_norm_like(module: nn.Module) -> bool:
    return [(path, value.ndim) for path, value in tree_flatten(module.parameters())] == [("weight", 1)]


def _try_product(module: nn.Module) -> GatedProduct | None:
    pair = (_sample((3, 16), 0) * 2, _sample((3, 16), 1) * 2)
    found = module(*pair)
    for activation, gate in itertools.product(gated_activation.ACTIVATIONS, (0, 1)):
        if _same(found, gated_activation.reference(activation, pair[gate], pair[1 - gate])):
            return GatedProduct(activation, gate)
    return None


def _try_embedding(module: nn.Module) -> Embedding | None:
    before = module.weight
    module.weight = _sample((8, before.shape[1]), 0)
    numbers = mx.array([[0, 2, 1], [7, 1, 1]])
    try:
        found = module(numbers)
        fits = isinstance(found, mx.array) and mx.array_equal(found, module.weight[numbers])
    finally:
        module.weight = before
    return Embedding() if fits else None


def _try_rotary(module: nn.Module) -> Rotary | None:
    values = plain_values(module).values()
    for width in sorted({value for value in values if type(value) is int and 0 < value <= 512 and value % 16 == 0}):
        x = _sample((2, 3, 5, width + 8), 0)
        try:
            found = module(x)
        except (TypeError, ValueError):
            continue
        for interleaved in (False, True):
            parts = module(rotary.ones_and_zeros(width, 5, interleaved=interleaved))
            cosine, sine = (part[0, 0] for part in rotary.pairs(parts, interleaved=interleaved))
            is_turned = float(mx.abs(sine).max()) > 0
            if is_turned and _same(found, rotary.reference(x, cosine, sine, interleaved, False)):
                return Rotary(width, interleaved)
    return None


def _try_mlp(module: nn.Module, inner: list[str]) -> GatedMLP | None:
    with _evaluating(module):
        for down in inner:
            gate, up = (name for name in inner if name != down)
            width = _input_width(module[gate])
            if width is None or width != _input_width(module[up]):
                continue
            x = _sample((3, width), 0).astype(_compute_type(module))
            found = module(x)
            for activation, (one, other) in itertools.product(gated_activation.ACTIVATIONS, ((gate, up), (up, gate))):
                product = gated_activation.reference(activation, module[one](x), module[other](x))
                if product.shape[-1] == _input_width(module[down]) and _same(found, module[down](product)):
                    if _is_ambiguous(activation, module[one](x), module[other](x)):
                        return None
                    is_plain = is_product(module[one]) and is_product(module[other])
                    return GatedMLP(activation, one, other, down, is_plain)
    return None


def _try_joined(module: nn.Module, inner: list[str]) -> JoinedMLP | None:
    with _evaluating(module):
        for both, down in (inner, reversed(inner)):
            x = _sample((3, _input_width(module[both]) or 0), 0).astype(_compute_type(module))
            joined = module[both](x)
            if joined.shape[-1] != 2 * (_input_width(module[down]) or 0):
                continue
            found, two = module(x), mx.split(joined, 2, axis=-1)
            for activation, gate in itertools.product(gated_activation.ACTIVATIONS, (0, 1)):
                product = gated_activation.reference(activation, two[gate], two[1 - gate])
                if _same(found, module[down](product)):
                    if _is_ambiguous(activation, two[gate], two[1 - gate]):
                        return None
                    return JoinedMLP(activation, gate, both, down)
    return None


def _is_ambiguous(activation: str, a: mx.array, b: mx.array) -> bool:
    """Return whether other products of two factors are the same: where weights are equal, or next to nothing.

    In operations that no compiler is asked for; the two forms of GELU, in bf16 one but for rounding, count as one.
    """
    with mx.stream(mx.cpu):
        x, y = a.astype(mx.float32), b.astype(mx.float32)
        silu, gelu = x * mx.sigmoid(x) * y, x * (1 + mx.erf(x / math.sqrt(2))) / 2 * y
        product, unlike = (silu, gelu) if activation == "silu" else (gelu, silu)
        turned = y * mx.sigmoid(y) * x if activation == "silu" else y * (1 + mx.erf(y / math.sqrt(2))) / 2 * x
        return any(_same(product.astype(a.dtype), other) for other in (unlike, turned))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Put a layer into evaluation mode until the block ends: an adapter's dropout is not what it computes."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _input_width(layer: Any) -> int | None:
    """Return how many numbers a linear layer takes, quantized or with an adapter too; None for what is none."""
    inner = layer.linear if isinstance(layer, nn.Module) and "linear" in layer else layer
    if not isinstance(inner, nn.Module) or "weight" not in inner or inner.weight.ndim != 2:
        return None
    width: int = inner.weight.shape[-1]
    return width * 32 // inner.bits if isinstance(inner, nn.QuantizedLinear) else width


def _compute_type(module: nn.Module) -> mx.Dtype:
    types = [value.dtype for _, value in tree_flatten(module.parameters())]
    return next((dtype for dtype in types if mx.issubdtype(dtype, mx.floating)), mx.float32)


def _sample(shape: tuple[int, ...], seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def _same(found: Any, expected: mx.array) -> bool:
    """Return whether two results are equal but for rounding, row by row; a constant tells nothing."""
    if not isinstance(found, mx.array) or found.shape != expected.shape:
        return False
    tolerance = 2e-5 if found.dtype == mx.float32 else 1e-2
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    largest = mx.abs(expected).max(-1)
    error = mx.abs(found - expected).max(-1)
    return bool(((largest > 0) & (error <= tolerance * largest)).all())
