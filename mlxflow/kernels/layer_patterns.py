"""What a layer can be that a kernel could serve: by what it is told apart, and how it computes with the kernel."""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec

from mlxflow.kernels import embedding, gated_activation, kernel_names, rms_norm, rotary
from mlxflow.kernels.layer_signature import settings
from mlxflow.ops.embedding_lookup import lookup, ordered_gradient

Call = Callable[..., Any]


class Norm(msgspec.Struct, frozen=True, tag=True):
    """A layer that is the norm of rows.

    Attributes:
        eps: added to the mean of the squares.
        offset: what is added to its weight: 1 in some architectures.
    """

    eps: float
    offset: float

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return kernel_names.rms_norm_name(dtype, module.weight.size)

    def call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return what a layer of a class does when it is called, with the kernel for a type."""
        function = rms_norm.rms_norm(self.eps, dtype)

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if others or named:
                return plain.__call__(layer, x, *others, **named)
            return function(x, self.weight(layer))

        return call

    def weight(self, layer: nn.Module) -> mx.array:
        """Return what a layer multiplies by, (D,)."""
        weight: mx.array = layer.weight
        return weight + self.offset if self.offset else weight


class GatedMLP(msgspec.Struct, frozen=True, tag=True):
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
        return (kernel_names.mlp_name if self.is_plain else kernel_names.gated_name)(self.activation, dtype)

    def call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return what a layer of a class does when it is called, with the kernel for a type."""
        product, projected = (
            gated_activation.gated(self.activation, dtype),
            gated_activation.projected(self.activation, dtype),
        )

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            gate, up = layer[self.gate], layer[self.up]
            if others or named or self.is_plain != (is_product(gate) and is_product(up)):
                return plain.__call__(layer, x, *others, **named)
            if self.is_plain:
                return layer[self.down](projected(x, gate.weight, up.weight))
            return layer[self.down](product(gate(x), up(x)))

        return call


class JoinedMLP(msgspec.Struct, frozen=True, tag=True):
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
        return kernel_names.gated_name(self.activation, dtype)

    def call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return what a layer of a class does when it is called, with the kernel for a type."""
        halves = gated_activation.gated(self.activation, dtype)

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if others or named:
                return plain.__call__(layer, x, *others, **named)
            two = mx.split(layer[self.both](x), 2, axis=-1)
            return layer[self.down](halves(two[self.gate], two[1 - self.gate]))

        return call


class GatedProduct(msgspec.Struct, frozen=True, tag=True):
    """A layer without weights that takes two arrays, one of which it activates.

    Attributes:
        activation: the activation's name.
        gate: 0 where the first is activated, 1 where the second is.
    """

    activation: str
    gate: int

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return kernel_names.gated_name(self.activation, dtype)

    def call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return what a layer of a class does when it is called, with the kernel for a type."""
        both = gated_activation.gated(self.activation, dtype)

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if len(others) != 1 or named:
                return plain.__call__(layer, x, *others, **named)
            pair = (x, others[0])
            return both(pair[self.gate], pair[1 - self.gate])

        return call


class Rotary(msgspec.Struct, frozen=True, tag=True):
    """A layer that turns the heads of each position, (B, H, L, E), by that position's angles.

    Attributes:
        width: how many numbers of a head are turned.
        interleaved: how the pairs lie: see `rotary`.
    """

    width: int
    interleaved: bool

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return kernel_names.rotary_name(dtype, self.width, interleaved=self.interleaved)

    def call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return what a layer of a class does when it is called, with the kernel for a type."""
        turned = rotary.rotary(self.interleaved, dtype)

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            begins_at_zero = (others, named) in (((), {}), ((0,), {}), ((), {"offset": 0}))
            if not begins_at_zero or x.dtype != dtype or not rotary.supports(x, self.width):
                return plain.__call__(layer, x, *others, **named)
            return turned(x, *self._turns(layer, plain, x.shape[2]))

        return call

    def _turns(self, layer: nn.Module, plain: type[nn.Module], length: int) -> tuple[mx.array, mx.array]:
        """Return the cosines and sines of positions, (L, D / 2) each: once for all layers that are alike."""
        hidden = tuple((key, value.tolist()) for key, value in layer.items() if isinstance(value, mx.array))
        key = (plain, self, length, repr(hidden), settings(layer))
        if key not in _TURNS:
            x = rotary.ones_and_zeros(self.width, length, interleaved=self.interleaved)
            parts = rotary.pairs(plain.__call__(layer, x), interleaved=self.interleaved)
            cosine, sine = (part[0, 0] for part in parts)
            _TURNS[key] = mx.contiguous(cosine), mx.contiguous(sine)
            mx.eval(_TURNS[key])
        return _TURNS[key]


_TURNS: dict[Hashable, tuple[mx.array, mx.array]] = {}


class Embedding(msgspec.Struct, frozen=True, tag=True):
    """A layer that returns rows of its weight."""

    def name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that would serve a layer."""
        return kernel_names.embedding_name(dtype)

    def call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return what a layer of a class does when it is called, with the kernel for a type."""

        def gradient(numbers: mx.array, incoming: mx.array, count: int) -> mx.array:
            serves = incoming.dtype == dtype and embedding.supports(incoming, count)
            return (embedding.kernel_gradient if serves else ordered_gradient)(numbers, incoming, count)

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if others or named:
                return plain.__call__(layer, x, *others, **named)
            return lookup(layer["weight"], x, gradient)

        return call


class Block(msgspec.Struct, frozen=True, tag=True):
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
        return kernel_names.block_name(dtype, module[self.norms[0]].weight.size)

    def call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return what a layer of a class does when it is called, with the kernel for a type."""
        before = rms_norm.past_and_norm(self.fits[0].eps, dtype)
        between = rms_norm.sum_and_norm(self.fits[1].eps, dtype)

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            _, *rest = in_order(plain, x, *others, **named)
            first, second = (fit.weight(layer[name]) for name, fit in zip(self.norms, self.fits, strict=True))
            past, normal = before(x, first)
            past, normal = between(past, layer[self.inner[0]](normal, *rest), second)
            return past + layer[self.inner[1]](normal)

        return call


Fit = Block | Norm | GatedMLP | JoinedMLP | GatedProduct | Rotary | Embedding


def is_product(layer: nn.Module) -> bool:
    """Return whether a layer is a product with its weight and nothing else."""
    return type(layer) is nn.Linear and "bias" not in layer


def in_order(plain: type[nn.Module], *others: Any, **named: Any) -> tuple[Any, ...]:
    """Return what a layer of a class is called with by its places, defaults included."""
    bound = inspect.signature(plain.__call__).bind(None, *others, **named)
    bound.apply_defaults()
    return bound.args[1:]
