"""Layers that hold codes instead of weights: whether a model has some, and the dense model that they stand for."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.errors import ArtifactError
from mlxflow.models import adapter_files, config_json
from mlxflow.ops import mlx_lm_import


def is_quantized(model: nn.Module) -> bool:
    """Return whether some layer of a model holds codes instead of weights."""
    return any(holds_codes(layer) for layer in model.modules())


def holds_codes(layer: nn.Module) -> bool:
    """Return whether a layer holds codes instead of weights, with scales beside them or without."""
    weight = layer.get("weight")
    return "scales" in layer or (isinstance(weight, mx.array) and mx.issubdtype(weight.dtype, mx.integer))


def made_dense(model: nn.Module, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model whose every layer has a dense weight, and its config: adapters are added in, codes unpacked.

    Args:
        model: changed; lazily loaded weights stay on the disk.
        config: its `config.json`.

    Raises:
        ArtifactError: mlx-lm computes with some of its layers, such as BitNet's, but cannot unpack them.
    """
    return dequantized(model, config) if is_quantized(model) else (adapter_files.fuse(model), dict(config))


def dequantized(model: nn.Module, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a quantized model with dense weights, and its config without a word of quantization.

    Adapters are added into the dense weights.

    Raises:
        ArtifactError: mlx-lm computes with some of its layers, such as BitNet's, but cannot unpack them.
    """
    require_unpackable(model)
    dense = _unpacked(adapter_files.fuse(model, dequantize=True))
    names = [name for name, _ in tree_flatten(dense.parameters())]
    return dense, config_json.describing(config, weights=names, is_quantized=False)


def require_unpackable(model: nn.Module) -> None:
    """Make sure that every quantized layer of a model can become a dense one.

    Raises:
        ArtifactError: mlx-lm computes with a layer, such as BitNet's, but cannot unpack it.
    """
    from mlx_lm.models.mla import QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)
    for path, layer in model.named_modules():
        if holds_codes(layer) and not isinstance(layer, kinds):
            raise ArtifactError(f"{path}: mlx-lm cannot unpack a {type(layer).__name__}. Name a dense model.")


def dense_weights(model: nn.Module, paths: Iterable[str]) -> dict[str, Callable[[], mx.array]]:
    """Return what gives the weight that each of some layers computes with, dequantized where it is packed."""
    modules = dict(model.named_modules())
    return {path: partial(dense_weight, modules[path]) for path in paths}


def dense_weight(layer: nn.Module) -> mx.array:
    """Return the weight that a layer computes with, dequantized where it is packed."""
    if "scales" not in layer:
        weight: mx.array = layer.weight
        return weight
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


def for_evaluation(model: nn.Module) -> nn.Module:
    """Return a model that gives the same results and evaluates many tokens at once without undue delay.

    MLX's packed matrix product on the CPU runs at a few GFLOP/s at any width; there the weights are dequantized first.
    """
    if mx.default_device() != mx.cpu:
        return model
    return _unpacked(model)


def _unpacked(model: nn.Module) -> nn.Module:
    """Return a model with its codes unpacked; those of latent attention too, which mlx-lm's function leaves out."""
    mlx_lm_import.prepare()
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

    dense: nn.Module = mlx_lm_import.mlx_lm_utils().dequantize_model(model)
    made = []
    for path, layer in dense.named_modules():
        if isinstance(layer, QuantizedMultiLinear):
            weight = dense_weight(layer)
            num_heads, output_dims, input_dims = weight.shape
            made.append((path, MultiLinear(input_dims, output_dims, num_heads)))
            made[-1][1].weight = weight
    dense.update_modules(tree_unflatten(made))
    return dense
