"""The dtypes of a model's weights while it is trained; scales of frozen quantized matrices stay in 16 bits."""

from collections.abc import Container

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlxflow.ops import wide_scales
from mlxflow.training.settings import TrainingSettings

# Layers with scales that may stay in 16 bits
_KEEPING = (nn.QuantizedLinear, nn.QuantizedEmbedding)


def dtype_of(settings: TrainingSettings) -> mx.Dtype:
    """Return the dtype in which the model computes."""
    return mx.float32 if settings.precision == "fp32" else mx.bfloat16


def cast_weights(model: nn.Module, settings: TrainingSettings) -> None:
    """Give a model's floating weights the dtype in which it computes, one after the other: not all are held twice.

    Scales and biases of frozen quantized matrices stay in 16 bits where adapters are trained in fp32: each product, and
    each lookup and DoRA layer by `ops.wide_scales`, widens them, to the same numbers.

    Args:
        model: changed and evaluated.
        settings: of the training.
    """
    dtype, shape = dtype_of(settings), settings.adapter_shape
    kept: dict[str, nn.Module] = {}
    if shape is not None and dtype == mx.float32:
        kept = {path: layer for path, layer in model.named_modules() if type(layer) in _KEEPING}
        for layer in kept.values():
            wide_scales.mark(layer)
        if shape.method == "dora":
            wide_scales.install_in_dora()

    def cast(name: str, weight: mx.array) -> mx.array:
        is_cast = mx.issubdtype(weight.dtype, mx.floating) and not _is_of_codes(name, kept)
        return weight.astype(dtype) if is_cast else weight

    model.update(tree_map_with_path(cast, model.parameters()))
    for _, weight in tree_flatten(model.parameters()):
        mx.eval(weight)


def _is_of_codes(name: str, layers: Container[str]) -> bool:
    path, _, own = name.rpartition(".")
    return own in ("scales", "biases") and path in layers


def widen_scales(model: nn.Module, settings: TrainingSettings) -> None:
    """Give scales that `cast_weights` left in 16 bits the dtype in which the model computes, to write the model.

    Args:
        model: changed, not evaluated.
        settings: of the training.
    """
    model.set_dtype(dtype_of(settings))
    for layer in model.modules():
        wide_scales.unmark(layer)
