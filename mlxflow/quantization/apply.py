"""Quantize a model in place, as mlx-lm's converter does it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.errors import CallError


class Quantized(NamedTuple):
    """What was done to a model.

    Attributes:
        config: its `config.json` with the quantization settings in both places where readers look.
        layers: module paths that were quantized, in the model's order.
        dense_layers: module paths that could have been but whose width the group size does not divide.
        bits_per_weight: stored bits over parameters, scales and biases included.
        dense_bits_per_weight: the same before.
    """

    config: dict[str, Any]
    layers: list[str]
    dense_layers: list[str]
    bits_per_weight: float
    dense_bits_per_weight: float


def quantize(
    model: nn.Module, config: Mapping[str, Any], *, bits: int, group_size: int, mode: str, key: str
) -> Quantized:
    """Replace every layer that can be quantized by its packed form.

    Args:
        model: dense; changed in place.
        config: its `config.json`.
        bits: bits of a code.
        group_size: weights along the last axis that share a scale.
        mode: one of MLX's quantization modes.
        key: the table's name, for the message.

    Raises:
        CallError: no layer's width divides by the group size.
    """
    before = list(tree_flatten(model.parameters()))
    parameters = sum(value.size for _, value in before)
    dense_bits = 8 * sum(value.nbytes for _, value in before)
    layers: list[str] = []
    dense_layers: list[str] = []

    def wanted(path: str, module: nn.Module) -> bool:
        if not hasattr(module, "to_quantized"):
            return False
        divides: bool = module.weight.shape[-1] % group_size == 0
        (layers if divides else dense_layers).append(path)
        return divides

    nn.quantize(model, group_size=group_size, bits=bits, mode=mode, class_predicate=wanted)
    if not layers:
        raise CallError(
            f"{key}.group_size = {group_size}: divides the width of no layer. Use a smaller one or wider layers."
        )
    mx.eval(model.parameters())
    settings = {"group_size": group_size, "bits": bits, "mode": mode}
    stored_bits = 8 * sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    return Quantized(
        {**config, "quantization": settings, "quantization_config": settings},
        layers,
        dense_layers,
        stored_bits / parameters,
        dense_bits / parameters,
    )
