"""Sizes of a quantized model for the report: bytes and bits per weight of the whole and of each layer."""

from typing import Any

from mlxflow.quantization.plan import QuantizationPlan
from mlxflow.quantization.streaming_export import Exported, LayerFacts


def sizes(exported: Exported, plan: QuantizationPlan, file_bytes: int) -> dict[str, Any]:
    """Return the sizes of a written model for the report, by layer and whole.

    Args:
        exported: what was written.
        plan: of its layers.
        file_bytes: of `model.safetensors`.
    """
    default = plan.default
    return {
        "mode": default.mode,
        "bits": default.bits,
        "group_size": default.group_size,
        "parameters": exported.parameters,
        "bits_per_weight": 8 * exported.num_bytes / exported.parameters,
        "dense_bits_per_weight": 8 * exported.dense_bytes / exported.parameters,
        "model_bytes": file_bytes,
        "compression_ratio_fp32": 4 * exported.parameters / file_bytes,
        "compression_ratio_bf16": 2 * exported.parameters / file_bytes,
        "quantized_layers": list(plan.layers),
        "dense_layers": [*plan.skipped, *plan.undivided],
        "layers": [_layer_row(layer) for layer in exported.layers],
    }


def _layer_row(layer: LayerFacts) -> dict[str, Any]:
    setting = layer.setting
    return {
        "path": layer.path,
        "shape": list(layer.shape),
        "mode": setting.mode if setting else "dense",
        "bits": setting.bits if setting else 0,
        "group_size": setting.group_size if setting else 0,
        "bytes": layer.num_bytes,
        "parameters": layer.parameters,
        "bits_per_weight": 8 * layer.num_bytes / layer.parameters,
        "relative_error": layer.relative_error,
    }
