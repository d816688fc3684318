"""Recognizes layer patterns: runs a layer on random inputs and compares the result with each pattern's."""

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.device.memory_errors import is_late
from mlxflow.kernels import gated_activation, rms_norm, rotary
from mlxflow.kernels.layer_patterns import (
    Block,
    Embedding,
    GatedMLP,
    GatedProduct,
    JoinedMLP,
    LayerPattern,
    Norm,
    Rotary,
    is_plain_linear,
    positional_arguments,
)
from mlxflow.kernels.layer_signature import plain_values
from mlxflow.ops.eval_mode import evaluating


class Detection(NamedTuple):
    """The result of running a layer.

    Attributes:
        pattern: of the layer; None if it matches none.
        is_cacheable: whether the result holds for all weights of this class, these settings and shapes.
    """

    pattern: LayerPattern | None
    is_cacheable: bool


def may_match(module: nn.Module) -> bool:
    """Return whether a layer can match a pattern by what it holds: inner layers, one array, or nothing.

    One that holds both inner layers and an array cannot: what it computes may change with that array.
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


def detect_pattern(module: nn.Module) -> Detection:
    """Find the pattern of a layer by running it.

    Args:
        module: as it is trained, evaluated; restored afterwards.
    """
    inner = [name for name, value in module.children().items() if isinstance(value, nn.Module)]
    depends_on_weights = len(inner) in (2, 3)
    try:
        pattern = _match(module, inner)
    except RuntimeError as error:  # out of memory, maybe
        if is_late(error):  # of what was computed before
            raise
        return Detection(None, False)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError):
        return Detection(None, not depends_on_weights)
    return Detection(pattern, pattern is not None or not depends_on_weights)


def _match(module: nn.Module, inner: list[str]) -> LayerPattern | None:
    parameters = tree_flatten(module.parameters())
    if len(inner) != len(module.children()):
        return None
    if len(inner) == 3:
        return _match_mlp(module, inner)
    if len(inner) == 2:
        return _match_joined_mlp(module, inner)
    with mx.stream(mx.cpu):  # a GPU takes long for the first operation of each kind
        if len(inner) == 4:
            return _match_block(module, inner)
        if _is_norm_like(module):
            return _match_norm(module)
        if [(path, value.ndim) for path, value in parameters] == [("weight", 2)]:
            return _match_embedding(module)
        return None if parameters else _match_rotary(module) or _match_product(module)


def _match_norm(module: nn.Module) -> Norm | None:
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


def _match_block(module: nn.Module, inner: list[str]) -> Block | None:
    """Run a block with simple functions for its layers, to see what it adds and which layer gets which arguments."""
    norms = [name for name in inner if _is_norm_like(module[name])]
    layers = [name for name in inner if name not in norms]
    patterns = {name: _match_norm(module[name]) for name in norms}
    if None in patterns.values() or len({module[name].weight.size for name in norms}) > 1:
        return None
    functions = dict(zip(inner, (mx.sin, mx.exp, mx.tanh, mx.square), strict=True))
    others = [object() for _ in positional_arguments(type(module), *[0] * _parameter_count(type(module)))][1:]
    x = _sample((2, 8), 0)
    result, received = _run_with_functions(module, functions, x, others)
    for (norm, other_norm), (first, second) in itertools.product(
        itertools.permutations(norms), itertools.permutations(layers)
    ):
        h = x + functions[first](functions[norm](x))
        is_passed_on = received.get(first) == others and received.get(second) == []
        if is_passed_on and _same(result, h + functions[second](functions[other_norm](h))):
            pair = (cast("Norm", patterns[norm]), cast("Norm", patterns[other_norm]))
            return Block((norm, other_norm), (first, second), pair)
    return None


def _run_with_functions(
    module: nn.Module, functions: Mapping[str, Callable[[mx.array], mx.array]], x: mx.array, others: list[Any]
) -> tuple[Any, dict[str, list[Any]]]:
    """Call a block whose layers are replaced by functions; return its result and each layer's further arguments."""
    received: dict[str, list[Any]] = {}

    def replacement(name: str) -> Callable[..., mx.array]:
        def call(x: mx.array, *further: Any) -> mx.array:
            received[name] = [*further]
            return functions[name](x)

        return call

    original = {name: module[name] for name in functions}
    try:
        for name in functions:
            module[name] = replacement(name)
        return module(x, *others), received
    finally:
        for name, layer in original.items():
            module[name] = layer


def _parameter_count(kind: type[nn.Module]) -> int:
    return len(inspect.signature(kind.__call__).parameters) - 1


def _is_norm_like(module: nn.Module) -> bool:
    return [(path, value.ndim) for path, value in tree_flatten(module.parameters())] == [("weight", 1)]


def _match_product(module: nn.Module) -> GatedProduct | None:
    pair = (_sample((3, 16), 0) * 2, _sample((3, 16), 1) * 2)
    result = module(*pair)
    for activation, gate in itertools.product(gated_activation.ACTIVATIONS, (0, 1)):
        if _same(result, gated_activation.reference(activation, pair[gate], pair[1 - gate])):
            return GatedProduct(activation, gate)
    return None


def _match_embedding(module: nn.Module) -> Embedding | None:
    before = module.weight
    module.weight = _sample((8, before.shape[1]), 0)
    numbers = mx.array([[0, 2, 1], [7, 1, 1]])
    try:
        result = module(numbers)
        is_lookup = isinstance(result, mx.array) and mx.array_equal(result, module.weight[numbers])
    finally:
        module.weight = before
    return Embedding() if is_lookup else None


def _match_rotary(module: nn.Module) -> Rotary | None:
    values = plain_values(module).values()
    for width in sorted({value for value in values if type(value) is int and 0 < value <= 512 and value % 16 == 0}):
        x = _sample((2, 3, 5, width + 8), 0)
        try:
            result = module(x)
        except (TypeError, ValueError):
            continue
        for interleaved in (False, True):
            parts = module(rotary.ones_and_zeros(width, 5, interleaved=interleaved))
            cosine, sine = (part[0, 0] for part in rotary.pairs(parts, interleaved=interleaved))
            is_swapped = float(mx.abs(sine).max()) > 0
            if is_swapped and _same(result, rotary.reference(x, cosine, sine, interleaved, False)):
                return Rotary(width, interleaved)
    return None


def _match_mlp(module: nn.Module, inner: list[str]) -> GatedMLP | None:
    with evaluating(module):
        for down in inner:
            gate, up = (name for name in inner if name != down)
            width = _input_width(module[gate])
            if width is None or width != _input_width(module[up]):
                continue
            x = _sample((3, width), 0).astype(_compute_type(module))
            result = module(x)
            for activation, (one, other) in itertools.product(gated_activation.ACTIVATIONS, ((gate, up), (up, gate))):
                product = gated_activation.reference(activation, module[one](x), module[other](x))
                if product.shape[-1] == _input_width(module[down]) and _same(result, module[down](product)):
                    if _is_ambiguous(activation, module[one](x), module[other](x)):
                        return None
                    is_plain = is_plain_linear(module[one]) and is_plain_linear(module[other])
                    return GatedMLP(activation, one, other, down, is_plain)
    return None


def _match_joined_mlp(module: nn.Module, inner: list[str]) -> JoinedMLP | None:
    with evaluating(module):
        for both, down in (inner, reversed(inner)):
            x = _sample((3, _input_width(module[both]) or 0), 0).astype(_compute_type(module))
            joined = module[both](x)
            if joined.shape[-1] != 2 * (_input_width(module[down]) or 0):
                continue
            result, two = module(x), mx.split(joined, 2, axis=-1)
            for activation, gate in itertools.product(gated_activation.ACTIVATIONS, (0, 1)):
                product = gated_activation.reference(activation, two[gate], two[1 - gate])
                if _same(result, module[down](product)):
                    if _is_ambiguous(activation, two[gate], two[1 - gate]):
                        return None
                    return JoinedMLP(activation, gate, both, down)
    return None


def _is_ambiguous(activation: str, a: mx.array, b: mx.array) -> bool:
    """Return whether another gated activation gives the same result: with equal weights, or tiny ones.

    Only precompiled operations are used. The two forms of GELU, equal in bf16 up to rounding, count as one.
    """
    with mx.stream(mx.cpu):
        x, y = a.astype(mx.float32), b.astype(mx.float32)
        silu, gelu = x * mx.sigmoid(x) * y, x * (1 + mx.erf(x / math.sqrt(2))) / 2 * y
        product, other_activation = (silu, gelu) if activation == "silu" else (gelu, silu)
        swapped = y * mx.sigmoid(y) * x if activation == "silu" else y * (1 + mx.erf(y / math.sqrt(2))) / 2 * x
        return any(_same(product.astype(a.dtype), other) for other in (other_activation, swapped))


def _input_width(layer: Any) -> int | None:
    """Return the input width of a linear layer, also quantized or with an adapter; None for another layer."""
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


def _same(result: Any, expected: mx.array) -> bool:
    """Return whether two results are equal up to rounding, row by row; rows of zeros do not count as equal."""
    if not isinstance(result, mx.array) or result.shape != expected.shape:
        return False
    tolerance = 2e-5 if result.dtype == mx.float32 else 1e-2
    result, expected = result.astype(mx.float32), expected.astype(mx.float32)
    largest = mx.abs(expected).max(-1)
    error = mx.abs(result - expected).max(-1)
    return bool(((largest > 0) & (error <= tolerance * largest)).all())
