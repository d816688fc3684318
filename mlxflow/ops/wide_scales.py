"""Layers that dequantize in fp32 with 16-bit or 8-bit scales: the numbers of widened scales, in less memory.

A product with packed codes widens 16-bit scales to the dtype of its rows. mlx-lm's DoRA layer and MLX's embedding of
quantized weights dequantize in the dtype of the scales instead, and bf16 would round the weights. Here the layers that
are marked cast their scales first; the cast is a part of each pass, so only codes and 16-bit scales are held.

Codes of mxfp4, mxfp8 and nvfp4 have scales of 8 bits, and MLX dequantizes them in bf16. That rounds no weight, but what
a model computes of the rows, such as Gemma's multiple of an embedding, would be rounded to bf16. A marked layer returns
fp32.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import mlx_lm_import, patching
from mlxflow.ops.quantized_matmul import widened


def mark(layer: Any) -> None:
    """Let a quantized layer, and a DoRA layer around it, dequantize in fp32 whatever the dtype of its scales is."""
    layer.widens_scales = True
    patching.install(nn.QuantizedEmbedding, "__call__", _embedding(nn.QuantizedEmbedding.__call__), by=__name__)


def unmark(layer: nn.Module) -> None:
    """Undo `mark`; does nothing to another layer."""
    vars(layer).pop("widens_scales", None)


def install_in_dora() -> None:
    """Let DoRA layers of this process, those to come too, heed the mark of the layer that they wrap."""
    mlx_lm_import.tuner_utils()
    from mlx_lm.tuner.dora import DoRALinear

    patching.install(DoRALinear, "_dequantized_weight", _dora_weight(DoRALinear._dequantized_weight), by=__name__)


def _is_marked(layer: nn.Module) -> bool:
    return "widens_scales" in vars(layer)


def _embedding(plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def lookup(layer: Any, x: mx.array) -> mx.array:
        return _dequantized(layer, x) if _is_marked(layer) else plain(layer, x)

    return lookup


def _dora_weight(plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def weight(layer: Any) -> mx.array:
        return _dequantized(layer.linear) if _is_marked(layer.linear) else plain(layer)

    return weight


def _dequantized(layer: Any, rows: Any = ...) -> mx.array:
    """Return rows of a layer's weight in fp32."""
    arrays = tuple(layer[name][rows] for name in ("weight", "scales", "biases") if layer.get(name) is not None)
    codes, scales, *biases = widened(arrays, mx.float32)
    weight: mx.array = mx.dequantize(
        codes,
        scales,
        biases[0] if biases else None,
        layer.group_size,
        layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )
    return weight
