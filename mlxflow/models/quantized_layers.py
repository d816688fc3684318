"""Quantized layers of a model: detect them, and dequantize single weights or the whole model."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.messages.errors import ArtifactError
from mlxflow.models import adapter_files, fp32_on_cpu
from mlxflow.ops import mlx_lm_import, row_slices
from mlxflow.storage import config_json


def is_quantized(model: nn.Module) -> bool:
    """Return whether some layer of a model is quantized."""
    return any(holds_codes(layer) for layer in model.modules())


def holds_codes(layer: nn.Module) -> bool:
    """Return whether a layer holds quantized codes instead of a weight, with or without scales."""
    weight = layer.get("weight")
    return "scales" in layer or (isinstance(weight, mx.array) and mx.issubdtype(weight.dtype, mx.integer))


def made_dense(model: nn.Module, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with dense weights, and its config: adapters are fused, quantized layers dequantized.

    Args:
        model: changed; lazily loaded weights stay on the disk.
        config: its `config.json`.

    Raises:
        ArtifactError: a quantized layer, such as BitNet's, cannot be dequantized by mlx-lm.
    """
    return dequantized(model, config) if is_quantized(model) else (adapter_files.fuse(model), dict(config))


def dequantized(model: nn.Module, config: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Return a quantized model with dense weights, and its config without quantization; adapters are fused.

    Raises:
        ArtifactError: a quantized layer, such as BitNet's, cannot be dequantized by mlx-lm.
    """
    require_unpackable(model)
    dense = _unpacked(adapter_files.fuse(model, dequantize=True))
    names = [name for name, _ in tree_flatten(dense.parameters())]
    return dense, config_json.describing(config, weights=names, is_quantized=False)


def require_unpackable(model: nn.Module) -> None:
    """Check that every quantized layer of a model can be dequantized.

    Raises:
        ArtifactError: a layer, such as BitNet's, cannot be dequantized by mlx-lm.
    """
    from mlx_lm.models.mla import QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)
    for path, layer in model.named_modules():
        if holds_codes(layer) and not isinstance(layer, kinds):
            raise ArtifactError(f"{path}: mlx-lm cannot unpack a {type(layer).__name__}. Name a dense model.")


def dense_weights(model: nn.Module, paths: Iterable[str]) -> dict[str, Callable[[], mx.array]]:
    """Return functions that return the weights of some layers, dequantized if needed, by path."""
    modules = dict(model.named_modules())
    return {path: partial(dense_weight, modules[path]) for path in paths}


def dense_weight(layer: nn.Module) -> mx.array:
    """Return the weight that a layer computes with, dequantized if it is quantized."""
    if "scales" not in layer:
        weight: mx.array = layer.weight
        return weight
    return row_slices.dequantized(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


def for_evaluation(model: nn.Module, *, reads_blocks: bool = False) -> nn.Module:
    """Return a model that is fast for many tokens at once on the CPU, in little memory, and at least as precise.

    MLX's quantized matrix product on the CPU runs at a few GFLOP/s, however many tokens there are. Linear layers of the
    blocks stay packed: `ops.quantized_matmul` dequantizes each for its product. All others are dequantized here: the
    head, for example, is called for few positions at a time. 16-bit models compute in fp32, see `fp32_on_cpu`.

    Args:
        model: changed.
        reads_blocks: whether its weights are lazy and one block is held at a time: then they are widened, however large
            the model is.
    """
    if mx.default_device() != mx.cpu:
        return model
    fp32_on_cpu.widen(model, at_any_size=reads_blocks)
    blocks = getattr(model, "layers", None) or []
    inside = {id(module) for block in blocks if isinstance(block, nn.Module) for module in block.modules()}
    packed = [
        (path, layer)
        for path, layer in model.named_modules()
        if type(layer) is nn.QuantizedLinear and id(layer) in inside
    ]
    dense = _unpacked(model)
    dense.update_modules(tree_unflatten(packed))
    fp32_on_cpu.widen(dense, at_any_size=reads_blocks)  # what was dequantized just now may have 16 bits
    return dense


def _unpacked(model: nn.Module) -> nn.Module:
    """Return a dequantized model, including layers of latent attention, which mlx-lm's function leaves out."""
    mlx_lm_import.prepare()
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

    quantized = {path: layer for path, layer in model.named_modules() if "scales" in layer}
    dense: nn.Module = mlx_lm_import.mlx_lm_utils().dequantize_model(model)
    layers = dict(dense.named_modules())
    for path, layer in quantized.items():
        if "scales" not in layers[path]:
            layers[path].weight = dense_weight(layer)  # in slices
    dense_layers = []
    for path, layer in layers.items():
        if isinstance(layer, QuantizedMultiLinear):
            weight = dense_weight(layer)
            num_heads, output_dims, input_dims = weight.shape
            dense_layers.append((path, MultiLinear(input_dims, output_dims, num_heads)))
            dense_layers[-1][1].weight = weight
    dense.update_modules(tree_unflatten(dense_layers))
    return dense
