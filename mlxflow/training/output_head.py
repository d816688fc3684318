"""The output head of a model: the layer whose product with the hidden states is the logits, and how it is found."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflow.ops.copying_products import copying_products
from mlxflow.ops.eval_mode import evaluating
from mlxflow.ops.patching import layer_method
from mlxflow.ops.quantized_matmul import Format, dequantize, widened

# Tokens of the pass with test values, and of the pass that compares two ways to the hidden states, which is computed
_TOKENS, _FEW_TOKENS = 8, 2

# Test values that a head returns instead of its product: powers of ten that every floating dtype holds
_SMALLEST_POWER, _LARGEST_POWER = -4, 4


class Head(NamedTuple):
    """The layer whose product with the hidden states is the logits.

    Attributes:
        is_tied: whether its weight is that of the embedding.
    """

    is_tied: bool

    def module(self, model: nn.Module) -> nn.Module:
        """Return the layer that holds the weight."""
        return model.model.embed_tokens if self.is_tied else model.lm_head

    def weight(self, model: nn.Module, dtype: mx.Dtype) -> mx.array:
        """Return the weight, (V, D), dequantized where it is quantized, rounded in fake quantization."""
        layer, packed = self.module(model), self.packed(model)
        if packed is not None:
            codes, form = packed
            return dequantize(widened(codes, dtype), form).astype(dtype)
        faked = getattr(type(layer), "fake_weight", None)  # of a class that `fake_quant.fake_quantized` made
        return cast("mx.array", layer.weight if faked is None else faked(layer))

    def packed(self, model: nn.Module) -> tuple[tuple[mx.array, ...], Format] | None:
        """Return codes, scales and biases of a quantized weight, and its format; None if it is not quantized."""
        layer = self.module(model)
        if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            return None
        weight = (layer.weight, layer.scales, *([] if layer.get("biases") is None else [layer.biases]))
        return weight, Format(layer.group_size, layer.bits, layer.mode)

    def is_trained(self, model: nn.Module) -> bool:
        """Return whether the weight, or what it is computed of, is trained."""
        return bool(self.module(model).trainable_parameters())


def known_head(model: nn.Module) -> Head:
    """Return the head of a model in which `find_head` found one: a weight of its own, or that of the embedding."""
    return Head(is_tied="lm_head" not in model)


def find_head(model: nn.Module, vocab_size: int) -> Head | None:
    """Return a model's head, if its logits are the product of one weight with the hidden states; None otherwise.

    The answer depends on the model's structure, not on the values of its logits: in a forward pass on a few tokens the
    head returns test values of every magnitude instead of its product, and the model must return them unchanged. A cap
    (Gemma 2), a scale (Cohere, Granite), a mask or a multiplier changes some of them.

    Args:
        model: of any architecture that mlx-lm knows.
        vocab_size: number of ids; that pass uses ids below it.
    """
    body = getattr(model, "model", None)
    is_tied = "lm_head" not in model
    layer = getattr(body, "embed_tokens", None) if is_tied else model.lm_head
    plain = (nn.Embedding, nn.QuantizedEmbedding) if is_tied else (nn.Linear, nn.QuantizedLinear)
    if not isinstance(body, nn.Module) or not isinstance(layer, nn.Module):
        return None
    if getattr(type(layer), "plain_type", type(layer)) not in plain or "bias" in layer:
        return None
    tokens = mx.arange(1, _TOKENS + 1)[None] % vocab_size
    try:
        with evaluating(model), copying_products():
            is_plain = _returns_the_product(model, body, layer, tokens, "as_linear" if is_tied else "__call__")
    except (AttributeError, TypeError, ValueError):
        return None
    return Head(is_tied) if is_plain else None


def _returns_the_product(model: nn.Module, body: Any, layer: nn.Module, tokens: mx.array, method: str) -> bool:
    """Return whether a model's logits are its head's output for the array that its body returned."""
    numbers = _numbers_of_every_size((*tokens.shape, layer.weight.shape[0]))
    seen = _ForwardArrays([], [])

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: Any, *inputs: Any, **named: Any) -> Any:
            seen.hidden.append(call(self, *inputs, **named))
            return seen.hidden[-1]

        return noted

    def answer(x: mx.array) -> mx.array:
        seen.given.append(x)
        return mx.array(numbers[:, : x.shape[1]]).astype(x.dtype)

    few = tokens[:, :_FEW_TOKENS]
    try:
        with (
            layer_method(body, "__call__", noting, by=__name__),
            layer_method(layer, method, lambda _: lambda self, x: answer(x), by=__name__),
        ):
            logits = model(tokens)  # only what follows the head is computed
            if not seen.passes_through() or not _are_equal(logits, numbers, seen.given[0].dtype):
                return False
            model(few)
        return _are_near(body(few), seen.hidden[-1])  # the body as `document_mask.apply_body` calls it
    finally:
        seen.hidden.clear()  # the replaced classes are in a reference cycle; the arrays must be freed earlier
        seen.given.clear()


class _ForwardArrays(NamedTuple):
    """Arrays of forward passes.

    Attributes:
        hidden: returned by the body.
        given: input of the head.
    """

    hidden: list[mx.array]
    given: list[mx.array]

    def passes_through(self) -> bool:
        """Return whether the head was given what the body returned, once."""
        return len(self.given) == 1 and len(self.hidden) == 1 and self.given[0] is self.hidden[0]


def _are_near(direct: mx.array, hidden: mx.array) -> bool:
    first, second = direct.astype(mx.float32), hidden.astype(mx.float32)
    return float(mx.abs(first - second).max()) < 0.02 * float(mx.abs(second).max())


def _are_equal(logits: mx.array, numbers: "np.ndarray[Any, np.dtype[np.float32]]", dtype: mx.Dtype) -> bool:
    wanted = mx.array(numbers).astype(dtype).astype(mx.float32)
    return bool(mx.array_equal(logits.astype(mx.float32), wanted))


def _numbers_of_every_size(shape: tuple[int, ...]) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """Return numbers of both signs whose magnitudes span more than the range of logits, in every row and column."""
    random = np.random.default_rng(0)
    powers = random.uniform(_SMALLEST_POWER, _LARGEST_POWER, shape)
    return (random.choice([-1.0, 1.0], shape) * 10**powers).astype(np.float32)
