"""Layer patterns that a fused kernel can replace: their settings, the kernel's name, the forward pass with it."""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec

from mlxflow.kernels import embedding, gated_activation, kernel_names, rms_norm, rotary
from mlxflow.kernels.layer_signature import settings_of
from mlxflow.ops.embedding_lookup import lookup, ordered_gradient

Call = Callable[..., Any]


def _is_frozen(norm: nn.Module) -> bool:
    """Return whether a norm's weight is not trained."""
    return "weight" not in norm.trainable_parameters()


class Norm(msgspec.Struct, frozen=True, tag=True):
    """A root-mean-square norm of rows.

    Attributes:
        eps: added to the mean of the squares.
        offset: added to its weight: 1 in some architectures.
    """

    eps: float
    offset: float

    def kernel_name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that can replace a layer."""
        return kernel_names.rms_norm_name(dtype, module.weight.size, is_frozen=_is_frozen(module))

    def patched_call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return the `__call__` of a layer of a class with the kernel for a dtype."""

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if others or named:
                return plain.__call__(layer, x, *others, **named)
            return rms_norm.rms_norm(self.eps, dtype, is_frozen=_is_frozen(layer))(x, self.weight(layer))

        return call

    def weight(self, layer: nn.Module) -> mx.array:
        """Return the weight with the offset, (D,)."""
        weight: mx.array = layer.weight
        return weight + self.offset if self.offset else weight


class GatedMLP(msgspec.Struct, frozen=True, tag=True):
    """A layer that is down(act(gate(x)) * up(x)).

    Attributes:
        activation: the activation's name.
        gate: the attribute that is activated.
        up: the attribute of the other factor.
        down: the attribute of the last projection.
        is_plain: whether gate and up are dense linear layers without a bias: no adapter, no quantized weight.
    """

    activation: str
    gate: str
    up: str
    down: str
    is_plain: bool

    def kernel_name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that can replace a layer."""
        return (kernel_names.mlp_name if self.is_plain else kernel_names.gated_name)(self.activation, dtype)

    def patched_call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return the `__call__` of a layer of a class with the kernel for a dtype."""
        product, projected = (
            gated_activation.gated(self.activation, dtype),
            gated_activation.projected(self.activation, dtype),
        )

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            gate, up = layer[self.gate], layer[self.up]
            if others or named or self.is_plain != (is_plain_linear(gate) and is_plain_linear(up)):
                return plain.__call__(layer, x, *others, **named)
            if self.is_plain:
                return layer[self.down](projected(x, gate.weight, up.weight))
            return layer[self.down](product(gate(x), up(x)))

        return call


class JoinedMLP(msgspec.Struct, frozen=True, tag=True):
    """A layer that is down(act(a) * b), where a and b are the two halves of one projection.

    Attributes:
        activation: the activation's name.
        gate: 0 where the first half is activated, 1 where the second is.
        both: the attribute of that projection.
        down: the attribute of the last projection.
    """

    activation: str
    gate: int
    both: str
    down: str

    def kernel_name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that can replace a layer."""
        return kernel_names.gated_name(self.activation, dtype)

    def patched_call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return the `__call__` of a layer of a class with the kernel for a dtype."""
        halves = gated_activation.gated(self.activation, dtype)

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if others or named:
                return plain.__call__(layer, x, *others, **named)
            two = mx.split(layer[self.both](x), 2, axis=-1)
            return layer[self.down](halves(two[self.gate], two[1 - self.gate]))

        return call


class GatedProduct(msgspec.Struct, frozen=True, tag=True):
    """A layer without weights that takes two arrays and returns act(a) * b.

    Attributes:
        activation: the activation's name.
        gate: 0 where the first is activated, 1 where the second is.
    """

    activation: str
    gate: int

    def kernel_name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that can replace a layer."""
        return kernel_names.gated_name(self.activation, dtype)

    def patched_call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return the `__call__` of a layer of a class with the kernel for a dtype."""
        both = gated_activation.gated(self.activation, dtype)

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if len(others) != 1 or named:
                return plain.__call__(layer, x, *others, **named)
            pair = (x, others[0])
            return both(pair[self.gate], pair[1 - self.gate])

        return call


class Rotary(msgspec.Struct, frozen=True, tag=True):
    """A rotary position embedding of heads, (B, H, L, E).

    Attributes:
        width: the dimensions of a head that are rotated.
        interleaved: the layout of the pairs: see `rotary`.
    """

    width: int
    interleaved: bool

    def kernel_name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that can replace a layer."""
        return kernel_names.rotary_name(dtype, self.width, interleaved=self.interleaved)

    def patched_call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return the `__call__` of a layer of a class with the kernel for a dtype."""
        turned = rotary.rotary(self.interleaved, dtype)

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            begins_at_zero = (others, named) in (((), {}), ((0,), {}), ((), {"offset": 0}))
            if not begins_at_zero or x.dtype != dtype or not rotary.supports(x, self.width):
                return plain.__call__(layer, x, *others, **named)
            return turned(x, *self._cosines_and_sines(layer, plain, x.shape[2]))

        return call

    def _cosines_and_sines(self, layer: nn.Module, plain: type[nn.Module], length: int) -> tuple[mx.array, mx.array]:
        """Return the cosines and sines of positions, (L, D / 2) each: computed once for all equal layers."""
        hidden = tuple((key, value.tolist()) for key, value in layer.items() if isinstance(value, mx.array))
        key = (plain, self, length, repr(hidden), settings_of(layer))
        if key not in _ANGLES:
            x = rotary.ones_and_zeros(self.width, length, interleaved=self.interleaved)
            parts = rotary.pairs(plain.__call__(layer, x), interleaved=self.interleaved)
            cosine, sine = (part[0, 0] for part in parts)
            _ANGLES[key] = mx.contiguous(cosine), mx.contiguous(sine)
            mx.eval(_ANGLES[key])
        return _ANGLES[key]


_ANGLES: dict[Hashable, tuple[mx.array, mx.array]] = {}


class Embedding(msgspec.Struct, frozen=True, tag=True):
    """A layer that returns rows of its weight."""

    def kernel_name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that can replace a layer."""
        return kernel_names.embedding_name(dtype)

    def patched_call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return the `__call__` of a layer of a class with the kernel for a dtype."""

        def gradient(numbers: mx.array, incoming: mx.array, count: int) -> mx.array:
            uses_kernel = incoming.dtype == dtype and embedding.supports(incoming, count)
            return (embedding.kernel_gradient if uses_kernel else ordered_gradient)(numbers, incoming, count)

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            if others or named:
                return plain.__call__(layer, x, *others, **named)
            return lookup(layer["weight"], x, gradient)

        return call


class Block(msgspec.Struct, frozen=True, tag=True):
    """A transformer block: h + second(norm(h)), where h = x + first(norm(x)).

    Attributes:
        norms: the attributes of the norms.
        inner: the attributes of the layers that follow them.
        patterns: of the norms.
    """

    norms: tuple[str, str]
    inner: tuple[str, str]
    patterns: tuple[Norm, Norm]

    def kernel_name(self, module: nn.Module, dtype: mx.Dtype) -> str:
        """Return the name of the kernel that can replace a layer."""
        norms = [module[name] for name in self.norms]
        return kernel_names.block_name(dtype, norms[0].weight.size, is_frozen=all(map(_is_frozen, norms)))

    def patched_call(self, plain: type[nn.Module], dtype: mx.Dtype) -> Call:
        """Return the `__call__` of a layer of a class with the kernel for a dtype."""

        def call(layer: nn.Module, x: mx.array, *others: Any, **named: Any) -> Any:
            _, *rest = positional_arguments(plain, x, *others, **named)
            first, second = (
                pattern.weight(layer[name]) for name, pattern in zip(self.norms, self.patterns, strict=True)
            )
            is_frozen = all(_is_frozen(layer[name]) for name in self.norms)
            before = rms_norm.residual_and_norm(self.patterns[0].eps, dtype, is_frozen=is_frozen)
            between = rms_norm.sum_and_norm(self.patterns[1].eps, dtype, is_frozen=is_frozen)
            past, normal = before(x, first)
            past, normal = between(past, layer[self.inner[0]](normal, *rest), second)
            return past + layer[self.inner[1]](normal)

        return call


LayerPattern = Block | Norm | GatedMLP | JoinedMLP | GatedProduct | Rotary | Embedding


def is_plain_linear(layer: nn.Module) -> bool:
    """Return whether a layer is a dense linear layer without a bias."""
    return type(layer) is nn.Linear and "bias" not in layer


def positional_arguments(plain: type[nn.Module], *others: Any, **named: Any) -> tuple[Any, ...]:
    """Return the arguments of a call in positional order, defaults included."""
    bound = inspect.signature(plain.__call__).bind(None, *others, **named)
    bound.apply_defaults()
    return bound.args[1:]
