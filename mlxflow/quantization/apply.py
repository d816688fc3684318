"""Quantize a model in memory: replace dense layers by packed ones."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.messages.errors import CallError, UserError
from mlxflow.quantization.codec import Packed, pack
from mlxflow.quantization.plan import Rule, check_supported, quantizable_layers, resolve
from mlxflow.quantization.settings import BITS, RequestedSetting, Setting


def apply_plan(model: nn.Module, layers: Mapping[str, Setting], packed: Mapping[str, Packed] | None = None) -> None:
    """Replace dense layers by quantized ones, one after the other.

    Args:
        model: dense; changed in place.
        layers: module path to setting.
        packed: codes by path; layers without codes are rounded to nearest.
    """
    dense = quantizable_layers(model)
    for path, setting in layers.items():
        codes = (packed or {}).get(path) or pack(dense[path].weight, setting)
        layer = dense.pop(path).to_quantized(**setting.stored())
        layer.weight, layer.scales = codes.weight, codes.scales
        if codes.biases is not None:
            layer.biases = codes.biases
        mx.eval(layer.parameters())
        model.update_modules(tree_unflatten([(path, layer)]))


def bits_per_weight(model: nn.Module) -> float:
    """Return stored bits, scales and biases included, per parameter of a dense or quantized model."""
    stored: int = 8 * sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    return stored / _num_parameters(model)


def _num_parameters(model: nn.Module) -> int:
    count = 0
    for _, layer in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        sizes = {name: value.size for name, value in tree_flatten(layer.parameters())}
        if "scales" in sizes:
            sizes.pop("scales")
            sizes.pop("biases", None)
            sizes["weight"] = sizes["weight"] * 32 // layer.bits
        count += sum(sizes.values())
    return count


def quantize_model_for_inference(
    model: nn.Module,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    layers: Sequence[Mapping[str, Any]] = (),
) -> nn.Module:
    """Quantize a model in memory and return it; works for any `mlx.nn` module with quantizable layers.

        >>> import mlx.core as mx, mlx.nn as nn
        >>> from mlxflow import quantize_model_for_inference
        >>> model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> model = quantize_model_for_inference(model, bits=4, layers=[{"match": "layers.2", "bits": 8}])
        >>> [layer.bits for layer in model.layers if isinstance(layer, nn.QuantizedLinear)]
        [4, 8]
        >>> model(mx.ones((1, 128))).shape
        (1, 64)

    Weights are rounded to the nearest code. The stage `quantize` of a workflow has other methods, and measures the
    effect on perplexity.

    Args:
        model: dense; its layers are replaced in place. Call `mx.compile` after this, not before.
        bits: of a code: 2, 3, 4, 5, 6 or 8; None for the mode's default, 4 (8 for "mxfp8").
        group_size: weights along the last axis that share a scale: 32, 64 or 128; None for the mode's default, 64 (32
            for "mxfp4" and "mxfp8", 16 for "nvfp4").
        mode: "affine", "symmetric", "mxfp4", "mxfp8" or "nvfp4".
        layers: rules for single layers; the first match applies. A rule has `match`, a pattern of module paths, and any
            of `bits`, `group_size`, `mode` and `skip`; a mode sets its default bits and group size, too.

    Raises:
        CallError: a setting is not supported by the mode or the installed MLX, a pattern matches no layer, a group size
            does not divide a named layer, or no layer would be quantized.
    """
    if mode not in BITS:
        raise CallError(f'mode = "{mode}": expected one of {", ".join(BITS)}. Use mode = "affine" (the default).')
    try:
        requested = RequestedSetting(mode, bits, group_size)
        rules = [_with_own(Rule(**rule), requested) for rule in layers]
        plan = resolve(model, default=requested.setting, rules=rules, key="quantize_model_for_inference")
        check_supported(plan.layers, "quantize_model_for_inference")
    except TypeError as error:
        raise CallError(f"layers: {error}. A rule has match, bits, group_size, mode and skip.") from error
    except UserError as error:
        raise CallError(*error.problems) from error
    apply_plan(model, cast("Mapping[str, Setting]", plan.layers))
    return model


def _with_own(rule: Rule, table: RequestedSetting) -> Rule:
    """Return a rule with the default bits and group size of its mode; `resolve` refuses an unknown mode."""
    if rule.mode is None or rule.mode not in BITS:
        return rule
    own = table.by_rule(rule.mode, rule.bits, rule.group_size)
    return rule._replace(bits=own["bits"], group_size=own["group_size"])
