"""Fake quantization for training: layers compute with rounded weights; gradients use the straight-through estimator.

The estimator is from Bengio et al. 2013 (arXiv:1308.3432), its use for quantization from Jacob et al. 2018
(arXiv:1712.05877). The forward pass uses exactly the weights that the export stores, computed by the same functions of
MLX, so the exported model equals the last forward pass.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import patching
from mlxflow.ops.custom_function import custom_function
from mlxflow.quantization.affine_grid import best_grid, round_on, where_on
from mlxflow.quantization.clipping import best_limits, clip, where_kept
from mlxflow.quantization.codec import Packed, pack, round_trip, symmetric_grid
from mlxflow.quantization.settings import Setting

# Attribute of a layer with its grid: scales and biases, or clipping limits; no parameter
_GRID = "_grid"


@contextmanager
def fake_quantized(model: nn.Module, layers: Mapping[str, Setting]) -> Iterator[Callable[[], dict[str, Packed]]]:
    """Let layers compute with their quantized weights until the block ends; yield a function that packs them.

    Each layer gets a subclass of its class, `plain_type`, with a method `fake_weight`, which returns the weight used
    in the forward pass; parameters keep their names. Enter the context before a step is compiled: a compiled function
    does not see a change of classes. A layer with an adapter beside it computes with the quantized sum of both,
    without the adapter's dropout. The grid of each group with the least error is searched once, here: a search in
    every step would cost more than the step.

    Args:
        model: dense, with adapters or without.
        layers: module path to setting.

    Raises:
        KeyError: the model has no module of a path.
    """
    modules = dict(model.named_modules())
    chosen = {path: modules[path] for path in layers}
    changes = [
        (module, _rounding_class(cast("Hashable", type(module)), layers[path])) for path, module in chosen.items()
    ]
    try:
        for path, module in chosen.items():
            module[_GRID] = _find_grid(_dense_weight(module), layers[path])
        mx.eval(model.state)
        with patching.layer_classes(changes, by=__name__):
            yield lambda: {path: _packed(module, layers[path]) for path, module in chosen.items()}
    finally:
        for module in chosen.values():
            module.pop(_GRID, None)


@functools.cache
def _rounding_class(plain: type[nn.Module], setting: Setting) -> type[nn.Module]:
    return computing_with(plain, lambda module: _straight_through(setting)(_dense_weight(module), module[_GRID]))


def computing_with(plain: type[nn.Module], fake_weight: Callable[[nn.Module], mx.array]) -> type[nn.Module]:
    """Return a subclass of a layer's class whose products use another weight.

    Args:
        plain: class of a linear layer, an embedding, a layer of experts, or one of them with an adapter beside it.
        fake_weight: returns the weight of a layer.
    """

    def through(name: str) -> Callable[..., Any]:
        def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
            weight = fake_weight(self)
            if hasattr(plain, "fuse"):  # an adapter: one product with the fused weight
                fused = plain.fuse(self)
                fused.weight = weight
                return fused(*arguments, **named)
            dense = self["weight"]
            self["weight"] = weight
            try:
                return getattr(plain, name)(self, *arguments, **named)
            finally:
                self["weight"] = dense

        return call

    methods = {"__call__": through("__call__"), "fake_weight": fake_weight, "plain_type": plain}
    if hasattr(plain, "as_linear"):
        methods["as_linear"] = through("as_linear")
    return type(f"FakeQuantized{plain.__name__}", (plain,), methods)


@functools.cache
def _straight_through(setting: Setting) -> Callable[..., mx.array]:
    """Return a function that rounds a weight; its gradient is that of the identity, and 0 for clipped weights.

    Not `w + stop_gradient(q - w)`: in bf16 that sum is not always q.
    """
    has_grid = setting.stored_mode == "affine"

    def forward(weight: mx.array, grid: mx.array) -> mx.array:
        return round_on(weight, setting, grid) if has_grid else round_trip(clip(weight, grid), setting)

    function = custom_function(forward)

    @function.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        weight, grid = primals
        gradient = where_on(weight, setting, grid, cotangent) if has_grid else where_kept(weight, grid, cotangent)
        return gradient, mx.zeros_like(grid)

    return cast("Callable[..., mx.array]", function)


def _find_grid(weight: mx.array, setting: Setting) -> mx.array:
    if setting.stored_mode != "affine":
        return best_limits(weight, setting)
    return (symmetric_grid if setting.mode == "symmetric" else best_grid)(weight, setting)


def _packed(module: nn.Module, setting: Setting) -> Packed:
    weight, grid = _dense_weight(module), module[_GRID]
    return pack(weight, setting, grid) if setting.stored_mode == "affine" else pack(clip(weight, grid), setting)


def _dense_weight(module: nn.Module) -> mx.array:
    """Return a layer's weight, including its adapter."""
    weight = module["weight"] if "weight" in module else module.fuse().weight
    return cast("mx.array", weight)
