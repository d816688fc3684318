"""Patches for mlx-lm's quantization functions: follow a plan, use fast products on the CPU, print nothing."""

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxflow.models.fp32_on_cpu import widened
from mlxflow.ops import patching
from mlxflow.ops.gradient_checkpointing import recomputed
from mlxflow.quantization.codec import Packed, pack
from mlxflow.quantization.plan import quantizable_layers
from mlxflow.quantization.settings import Setting
from mlxflow.storage.host_arrays import numpy_of

#: The error of `checked_factors`.
NOT_DEFINITE = "the Hessian of a layer is not positive definite"


def packed_layer(layer: nn.Module, setting: Setting) -> nn.Module:
    """Return a dense layer quantized by rounding to nearest; symmetric codes use affine storage."""
    quantized: nn.Module = layer.to_quantized(
        group_size=setting.group_size, bits=setting.bits, mode=setting.stored_mode
    )
    if setting.mode == "symmetric":
        quantized.weight, quantized.scales, quantized.biases = pack(layer.weight, setting)
    return quantized


def packed_layers(model: nn.Module, plan: Mapping[str, Setting]) -> dict[str, Packed]:
    """Return the codes of the quantized layers of a plan, evaluated."""
    modules = dict(model.named_modules())
    packed = {path: Packed(modules[path].weight, modules[path].scales, modules[path].get("biases")) for path in plan}
    mx.eval(packed)
    return packed


@contextlib.contextmanager
def following(model: nn.Module, plan: Mapping[str, Setting], *, free: set[str], hides: bool) -> Iterator[None]:
    """Make `to_quantized` of all layers except the free ones follow a plan; the model is dense again at the end.

    Args:
        model: dense.
        plan: module path to setting; layers that are not in it stay dense.
        free: paths of the layers that mlx-lm quantizes itself.
        hides: whether layers that stay dense lack `to_quantized`, for functions that look for it; else it returns the
            layer itself.
    """
    layers = quantizable_layers(model)
    changes = [
        (layer, _rounded(type(layer), plan[path]) if path in plan else _dense(type(layer), hides=hides))
        for path, layer in layers.items()
        if path not in free
    ]
    try:
        with patching.layer_classes(changes, by=__name__):
            yield
    finally:
        for layer in layers.values():
            for attribute in ("input_feat", "indices"):
                layer.pop(attribute, None)
        model.update_modules(tree_unflatten(list(layers.items())))


def _rounded(kind: type[nn.Module], setting: Setting) -> type[nn.Module]:
    def to_quantized(self: nn.Module, **_: Any) -> nn.Module:
        patching.restore_class(self)
        return packed_layer(self, setting)

    return type(kind.__name__, (kind,), {"to_quantized": to_quantized})


def _dense(kind: type[nn.Module], *, hides: bool) -> type[nn.Module]:
    def hidden(self: nn.Module) -> Any:
        raise AttributeError("stays dense")

    answer: Any = property(hidden) if hides else lambda self, **_: self
    return type(kind.__name__, (kind,), {"to_quantized": answer})


@contextlib.contextmanager
def dense_products(model: nn.Module) -> Iterator[None]:
    """On the CPU, make quantized layers use their weights in fp32: the quantized product is 39 times slower.

    Scales and biases may have 16 bits: they are widened, and so are the rows that an embedding gives.
    """
    kinds = _dense_product_kinds() if mx.default_device() == mx.cpu else {}
    layers = [layer for layer in model.modules() if type(layer) in kinds and layer.mode == "affine"]
    with patching.layer_classes([(layer, kinds[type(layer)]) for layer in layers], by=__name__):
        yield


@contextlib.contextmanager
def recomputing_blocks(model: nn.Module) -> Iterator[None]:
    """Keep only the inputs of a model's blocks for the backward pass, if it has a list of blocks.

    Else the activations of all blocks are held, and on the CPU all dequantized weights, see `dense_products`.
    """
    has_blocks = isinstance(getattr(model, "layers", None), list)
    with recomputed(model, every=1) if has_blocks else contextlib.nullcontext():
        yield


def _differentiable(layer: nn.Module, weight: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    """Return codes times scales plus biases, (..., N), in fp32, differentiable in scales and biases."""
    scales, biases = widened((scales, biases))
    codes = mx.dequantize(
        weight, mx.ones_like(scales), mx.zeros_like(biases), group_size=layer.group_size, bits=layer.bits
    )
    groups = codes.reshape(*scales.shape, layer.group_size) * scales[..., None] + biases[..., None]
    return groups.reshape(codes.shape)


class _DenseProductLinear(nn.QuantizedLinear):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        y = x @ _differentiable(self, self.weight, self.scales, self.biases).T
        return y + self["bias"] if "bias" in self else y


class _DenseProductEmbedding(nn.QuantizedEmbedding):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        return _differentiable(self, self.weight[x], self.scales[x], self.biases[x])

    def as_linear(self, x: mx.array) -> mx.array:
        return x @ _differentiable(self, self.weight, self.scales, self.biases).T


def _dense_product_kinds() -> dict[type[nn.Module], type[nn.Module]]:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    def product_of_experts(self: nn.Module, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        weight = _differentiable(self, self.weight, self.scales, self.biases).swapaxes(-1, -2)
        y = mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y

    return {
        nn.QuantizedLinear: _DenseProductLinear,
        nn.QuantizedEmbedding: _DenseProductEmbedding,
        QuantizedSwitchLinear: type("_DenseProductExperts", (QuantizedSwitchLinear,), {"__call__": product_of_experts}),
    }


@contextlib.contextmanager
def checked_factors() -> Iterator[None]:
    """Let the Cholesky decomposition of a matrix that is not positive definite raise an error.

    MLX returns anything for it. With a zero on the diagonal, inverting that fails in a thread of MLX 0.32, which may
    count the failed task as unfinished for ever: whatever the process evaluates above the memory limit later waits for
    it in an endless loop.
    """
    plain = mx.linalg.cholesky

    def cholesky(a: mx.array, upper: bool = False, *, stream: Any = None) -> mx.array:
        factor = plain(a, upper, stream=stream)
        pivots = mx.diagonal(factor, axis1=-2, axis2=-1, stream=stream)
        if not numpy_of((pivots > 0) & (pivots < mx.inf)).all():
            raise ValueError(NOT_DEFINITE)
        return factor

    with patching.attributes((mx.linalg, "cholesky", cholesky), by=__name__):
        yield


@contextlib.contextmanager
def precise_hessians() -> Iterator[None]:
    """Let mlx-lm's GPTQ compute its Hessians in fp32.

    It rounds those of each batch to the dtype of the hidden states: sums in fp16 overflow above 65,504, and in bf16
    they keep 8 bits.
    """
    from mlx_lm.quant import gptq

    class Catcher(gptq.Catcher):  # type: ignore[misc]
        H: mx.array

        def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            products = self.H
            outputs: mx.array = super().__call__(x, *args, **kwargs)
            inputs = x.flatten(0, -2).astype(mx.float32)
            self.H = products + inputs.T @ inputs  # theirs is lazy, and never computed
            return outputs

    with patching.attributes((gptq, "Catcher", Catcher), by=__name__):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress mlx-lm's output, except its progress bars on a terminal."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


@contextlib.contextmanager
def numpy_random_kept() -> Iterator[None]:
    """Restore the state of NumPy's global generator, which mlx-lm seeds."""
    before = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(before)
