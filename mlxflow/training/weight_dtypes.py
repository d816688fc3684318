"""The dtypes of a model's weights while it is trained; scales of frozen quantized matrices stay in 16 bits."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlxflow.training.settings import TrainingSettings


def dtype_of(settings: TrainingSettings) -> mx.Dtype:
    """Return the dtype in which the model computes."""
    return mx.float32 if settings.precision == "fp32" else mx.bfloat16


def cast_weights(model: nn.Module, settings: TrainingSettings) -> None:
    """Give a model's floating weights the dtype in which it computes, one after the other: not all are held twice.

    Scales and biases of frozen quantized matrices stay in 16 bits where LoRA is trained in fp32: each product widens
    them, to the same numbers. DoRA and embeddings dequantize in the dtype of the scales, so theirs are widened here.

    Args:
        model: changed and evaluated.
        settings: of the training.
    """
    dtype, shape = dtype_of(settings), settings.adapter_shape
    keeps = shape is not None and shape.method == "lora" and dtype == mx.float32
    kept = {path for path, layer in model.named_modules() if keeps and type(layer) is nn.QuantizedLinear}

    def cast(name: str, weight: mx.array) -> mx.array:
        is_cast = mx.issubdtype(weight.dtype, mx.floating) and not _is_of_codes(name, kept)
        return weight.astype(dtype) if is_cast else weight

    model.update(tree_map_with_path(cast, model.parameters()))
    for _, weight in tree_flatten(model.parameters()):
        mx.eval(weight)


def _is_of_codes(name: str, layers: set[str]) -> bool:
    path, _, own = name.rpartition(".")
    return own in ("scales", "biases") and path in layers


def widen_scales(model: nn.Module, settings: TrainingSettings) -> None:
    """Give scales that `cast_weights` left in 16 bits the dtype in which the model computes, to write the model.

    Args:
        model: changed, not evaluated.
        settings: of the training.
    """
    model.set_dtype(dtype_of(settings))
