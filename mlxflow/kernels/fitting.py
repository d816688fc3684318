"""Gives the layers of a model the kernels for training, by what they compute and not by what they are called.

A layer is tried on random inputs: what returns the root-mean-square norm of its input, the down projection of a gated
activation, its input turned by the angles of its positions, or rows of its weight, is given a class of its own that
inherits from its class. So is a block of which a trial with stand-ins for its layers shows what it adds to what.
Parameters keep their names; adapters, fake quantization and quantized weights within a layer go on as they were. Undone
when the block ends.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.kernels import embedding, gated, names, rms_norm, rotary
from mlxflow.kernels.choice import Choice
from mlxflow.lookup import lookup, ordered_gradient


class Norm(NamedTuple):
    """A layer that is the norm of rows.

    Attributes:
        eps: added to the mean of the squares.
        offset: what is added to its weight: 1 in some architectures.
    """

    eps: float
    offset: float

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return names.rms_norm_name(dtype, module.weight.size)


class GatedMLP(NamedTuple):
    """A layer that is down(act(gate(x)) * up(x)).

    Attributes:
        activation: the activation's name.
        gate: the attribute that is activated.
        up: the attribute of the other factor.
        down: the attribute of the last projection.
        is_plain: whether gate and up are products with a weight and nothing else: no adapter, no bias, no codes.
    """

    activation: str
    gate: str
    up: str
    down: str
    is_plain: bool

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return (names.mlp_name if self.is_plain else names.gated_name)(self.activation, dtype)


class JoinedMLP(NamedTuple):
    """A layer that is down(act(a) * b), where one projection gives both a and b, its two halves.

    Attributes:
        activation: the activation's name.
        gate: 0 where the first half is activated, 1 where the second is.
        both: the attribute of the projection that gives both.
        down: the attribute of the last projection.
    """

    activation: str
    gate: int
    both: str
    down: str

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return names.gated_name(self.activation, dtype)


class GatedProduct(NamedTuple):
    """A layer without weights that takes two arrays, one of which it activates.

    Attributes:
        activation: the activation's name.
        gate: 0 where the first is activated, 1 where the second is.
    """

    activation: str
    gate: int

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return names.gated_name(self.activation, dtype)


class Rotary(NamedTuple):
    """A layer that turns the heads of each position, (B, H, L, E), by that position's angles.

    Attributes:
        width: how many numbers of a head are turned.
        interleaved: how the pairs lie: see `rotary`.
    """

    width: int
    interleaved: bool

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return names.rotary_name(dtype, self.width, interleaved=self.interleaved)


class Embedding(NamedTuple):
    """A layer that returns rows of its weight."""

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return names.embedding_name(dtype)


class Block(NamedTuple):
    """A layer that is h + second(norm(h)), h being x + first(norm(x)), in which both norms are of rows.

    Attributes:
        norms: the attributes of the norms.
        inner: the attributes of what follows each.
        fits: the norms themselves.
    """

    norms: tuple[str, str]
    inner: tuple[str, str]
    fits: tuple[Norm, Norm]

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return names.block_name(dtype, module[self.norms[0]].weight.size)


Fit = Block | Norm | GatedMLP | JoinedMLP | GatedProduct | Rotary | Embedding


def find_fits(model: nn.Module) -> list[tuple[nn.Module, Fit]]:
    """Return the layers that kernels could serve, and as what.

    Layers of one class with equal settings and shapes are tried once.

    Args:
        model: of any architecture; its weights are as before afterwards.
    """
    known: dict[Hashable, Fit | None] = {}
    seen: dict[int, Hashable] = {}
    found = []
    for _, module in model.named_modules():
        if not _may_fit(module):
            continue
        key = _likeness(module, seen)
        if key not in known:
            known[key] = _try_layer(module)
        fit = known[key]
        if fit is not None:
            found.append((module, fit))
    return found


@contextmanager
def fitted(fits: list[tuple[nn.Module, Fit]], choice: Choice, dtype: mx.Dtype) -> Iterator[None]:
    """Let layers compute with the kernels that serve, until the block ends. Begin before a step is compiled.

    Args:
        fits: of `find_fits`.
        choice: which kernels serve.
        dtype: in which the model computes.
    """
    chosen = [(module, fit) for module, fit in fits if choice.serves(fit.name(module, dtype))]
    plain = [type(module) for module, _ in chosen]
    for module, fit in chosen:
        module.__class__ = _fitting(cast("Hashable", type(module)), fit, dtype)
    try:
        yield
    finally:
        for (module, _), kind in zip(chosen, plain, strict=True):
            module.__class__ = kind


@functools.cache
def _fitting(plain: type[nn.Module], fit: Fit, dtype: mx.Dtype) -> type[nn.Module]:
    if isinstance(fit, Norm):
        function = rms_norm.rms_norm(fit.eps, dtype)

        def call(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if others or named:
                return plain.__call__(self, x, *others, **named)
            return function(x, _norm_weight(self, fit))

    elif isinstance(fit, Block):
        before = rms_norm.past_and_norm(fit.fits[0].eps, dtype)
        between = rms_norm.sum_and_norm(fit.fits[1].eps, dtype)

        def call(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            _, *rest = _in_order(plain, x, *others, **named)
            first, second = (_norm_weight(self[name], one) for name, one in zip(fit.norms, fit.fits, strict=True))
            past, normal = before(x, first)
            past, normal = between(past, self[fit.inner[0]](normal, *rest), second)
            return past + self[fit.inner[1]](normal)

    elif isinstance(fit, GatedMLP):
        product, projected = gated.gated(fit.activation, dtype), gated.projected(fit.activation, dtype)

        def call(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            gate, up = self[fit.gate], self[fit.up]
            if others or named or fit.is_plain != (_is_product(gate) and _is_product(up)):
                return plain.__call__(self, x, *others, **named)
            if fit.is_plain:
                return self[fit.down](projected(x, gate.weight, up.weight))
            return self[fit.down](product(gate(x), up(x)))

    elif isinstance(fit, JoinedMLP):
        halves = gated.gated(fit.activation, dtype)

        def call(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if others or named:
                return plain.__call__(self, x, *others, **named)
            two = mx.split(self[fit.both](x), 2, axis=-1)
            return self[fit.down](halves(two[fit.gate], two[1 - fit.gate]))

    elif isinstance(fit, Rotary):
        turned = rotary.rotary(fit.interleaved, dtype)

        def call(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            begins_at_zero = (others, named) in (((), {}), ((0,), {}), ((), {"offset": 0}))
            if not begins_at_zero or x.dtype != dtype or not rotary.supports(x, fit.width):
                return plain.__call__(self, x, *others, **named)
            return turned(x, *_cosines_and_sines(self, plain, fit, x.shape[2]))

    elif isinstance(fit, Embedding):

        def gradient(numbers: mx.array, incoming: mx.array, count: int) -> mx.array:
            serves = incoming.dtype == dtype and embedding.supports(incoming, count)
            return (embedding.kernel_gradient if serves else ordered_gradient)(numbers, incoming, count)

        def call(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if others or named:
                return plain.__call__(self, x, *others, **named)
            return lookup(self["weight"], x, gradient)

    else:
        both = gated.gated(fit.activation, dtype)

        def call(self: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if len(others) != 1 or named:
                return plain.__call__(self, x, *others, **named)
            pair = (x, others[0])
            return both(pair[fit.gate], pair[1 - fit.gate])

    return type(f"Fitted{plain.__name__}", (plain,), {"__call__": call})


def _norm_weight(module: nn.Module, fit: Norm) -> mx.array:
    weight: mx.array = module.weight
    return weight + fit.offset if fit.offset else weight


def _in_order(plain: type[nn.Module], *others: Any, **named: Any) -> tuple[Any, ...]:
    """Return what a layer is called with by its places, defaults included."""
    bound = inspect.signature(plain.__call__).bind(None, *others, **named)
    bound.apply_defaults()
    return bound.args[1:]


def _cosines_and_sines(
    module: nn.Module, plain: type[nn.Module], fit: Rotary, length: int
) -> tuple[mx.array, mx.array]:
    """Return what a layer turns its positions by, (L, D / 2) each: once for all layers that are alike."""
    hidden = tuple((key, value.tolist()) for key, value in module.items() if isinstance(value, mx.array))
    key = (plain, fit, length, repr(hidden), _settings(module))
    if key not in _TURNS:
        x = rotary.ones_and_zeros(fit.width, length, interleaved=fit.interleaved)
        cosine, sine = (part[0, 0] for part in rotary.pairs(plain.__call__(module, x), interleaved=fit.interleaved))
        _TURNS[key] = mx.contiguous(cosine), mx.contiguous(sine)
        mx.eval(_TURNS[key])
    return _TURNS[key]


_TURNS: dict[Hashable, tuple[mx.array, mx.array]] = {}


def _likeness(value: Any, seen: dict[int, Hashable]) -> Hashable:
    """Return what layers have in common that compute the same from their weights; None for what is no part of a layer.

    Args:
        value: a layer, or what one holds.
        seen: what was returned for the layers of a model so far.
    """
    if isinstance(value, mx.array):
        return (value.shape, value.dtype)
    if isinstance(value, list | tuple):
        return tuple(_likeness(one, seen) for one in value)
    if not isinstance(value, dict):
        return None
    if id(value) not in seen:
        held = tuple((key, _likeness(one, seen)) for key, one in value.items())
        seen[id(value)] = (type(value), held, _settings(value) if isinstance(value, nn.Module) else None)
    return seen[id(value)]


def _settings(module: nn.Module) -> Hashable:
    return tuple(sorted((key, repr(value)) for key, value in _plain_values(module).items()))


def _plain_values(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in {**module, **vars(module)}.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | None)


def _may_fit(module: nn.Module) -> bool:
    """Return whether a layer holds what one that could fit holds: two or three linear layers, one array, or nothing."""
    within = [value for value in module.values() if isinstance(value, nn.Module)]
    if len(within) == 4:
        return sum(_is_norm_like(layer) for layer in within) == 2
    if within:
        return len(within) in (2, 3) and all(_input_width(layer) is not None for layer in within)
    shapes = [value.ndim for key, value in module.items() if isinstance(value, mx.array) and not key.startswith("_")]
    return shapes in ([], [1], [2])


def _try_layer(module: nn.Module) -> Fit | None:
    inner = [name for name, value in module.children().items() if isinstance(value, nn.Module)]
    parameters = tree_flatten(module.parameters())
    try:
        if len(inner) != len(module.children()):
            return None
        if len(inner) == 4:
            with mx.stream(mx.cpu):
                return _try_block(module, inner)
        if len(inner) == 3:
            return _try_mlp(module, inner)
        if len(inner) == 2:
            return _try_joined(module, inner)
        if _is_norm_like(module):
            with mx.stream(mx.cpu):
                return _try_norm(module)
        if [(path, value.ndim) for path, value in parameters] == [("weight", 2)]:
            return _try_embedding(module)
        if parameters:
            return None
        with mx.stream(mx.cpu):  # a GPU takes a while for the first operation of each kind
            return _try_rotary(module) or _try_product(module)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError):
        return None


def _try_norm(module: nn.Module) -> Norm | None:
    before = module.weight
    width = before.size
    x = _sample((3, width), 0) * mx.array([[1.0], [3e-3], [30.0]])
    values = _plain_values(module).values()
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
    told = [object() for _ in _in_order(type(module), *[0] * _places(type(module)))][1:]
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
    for activation, gate in itertools.product(gated.ACTIVATIONS, (0, 1)):
        if _same(found, gated.reference(activation, pair[gate], pair[1 - gate])):
            return GatedProduct(activation, gate)
    return None


def _try_embedding(module: nn.Module) -> Embedding | None:
    numbers = mx.array([[0, 2, 1], [len(module.weight) - 1, 1, 1]])
    found = module(numbers)
    fits = isinstance(found, mx.array) and mx.array_equal(found, module.weight[numbers])
    return Embedding() if fits else None


def _try_rotary(module: nn.Module) -> Rotary | None:
    values = _plain_values(module).values()
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
            for activation, (one, other) in itertools.product(gated.ACTIVATIONS, ((gate, up), (up, gate))):
                product = gated.reference(activation, module[one](x), module[other](x))
                if product.shape[-1] == _input_width(module[down]) and _same(found, module[down](product)):
                    is_plain = _is_product(module[one]) and _is_product(module[other])
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
            for activation, gate in itertools.product(gated.ACTIVATIONS, (0, 1)):
                product = gated.reference(activation, two[gate], two[1 - gate])
                if _same(found, module[down](product)):
                    return JoinedMLP(activation, gate, both, down)
    return None


def _is_product(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and "bias" not in layer


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
