"""Checks of a model folder's weights: valid headers, no tensor twice, floating dtypes, no unreadable codes."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import quantized_layers
from mlxflow.storage import tensor_reading, tensor_types


def require_sound(folder: Path, weights: Iterable[str]) -> None:
    """Refuse weight files with invalid headers, a dtype that MLX does not read, or a tensor that two files hold.

    MLX trusts headers, and mlx-lm would load either of two tensors of one name, regardless of the index.

    Args:
        folder: the model folder.
        weights: names of its weight files.

    Raises:
        ArtifactError: names the file and the tensor.
    """
    holders: dict[str, str] = {}
    for file in (name for name in weights if name.endswith(".safetensors")):
        types = tensor_reading.tensor_types(folder / file)
        if twice := sorted(types.keys() & holders.keys()):
            raise ArtifactError(
                f"{folder}: {holders[twice[0]]} and {file} both hold {twice[0]}. Remove one of the two."
            )
        if unread := sorted(name for name, kind in types.items() if kind in tensor_types.UNREAD_TYPES):
            raise ArtifactError(
                f"{folder / file}: {unread[0]} is of type {types[unread[0]]}, which MLX does not read. "
                "Convert the model to bf16 first."
            )
        holders |= dict.fromkeys(types, file)


def floating_layers(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Return the class of the layer of each floating weight, by the weight's name."""
    layers = dict(model.named_modules())
    return {
        name: type(layers.get(name.rpartition(".")[0], model))
        for name, value in tree_flatten(model.parameters())
        if mx.issubdtype(value.dtype, mx.floating)
    }


def require_numbers(folder: Path, model: nn.Module, floating: Mapping[str, type[nn.Module]]) -> None:
    """Refuse a model that has integers where its class has a floating weight.

    Args:
        folder: of the model, for the message.
        model: with the weights of its files.
        floating: `floating_layers` of the model before loading. A layer that was quantized while loading has another
            class since and is not checked.

    Raises:
        ArtifactError: names the first such weight.
    """
    layers = dict(model.named_modules())
    for name, value in tree_flatten(model.parameters()):
        layer = layers.get(name.rpartition(".")[0], model)
        if floating.get(name) is type(layer) and not mx.issubdtype(value.dtype, mx.floating):
            kind = str(value.dtype).rpartition(".")[2]
            raise ArtifactError(f"{folder}: {name} is of type {kind}: expected floating numbers. Name another model.")


def require_readable_codes(folder: Path, model: nn.Module) -> None:
    """Refuse a model with a dense layer whose weight holds quantized codes: it would compute noise without an error.

    Args:
        folder: of the model, for the message.
        model: with the weights of its files.

    Raises:
        ArtifactError: names the first such layer.
    """
    for path, layer in model.named_modules():
        if "scales" not in layer and hasattr(layer, "to_quantized") and quantized_layers.holds_codes(layer):
            raise ArtifactError(
                f"{folder}: {path}.weight holds codes ({str(layer.weight.dtype).rpartition('.')[2]}), and mlx-lm takes "
                "them for numbers. Convert the model to bf16 first."
            )
