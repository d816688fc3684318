"""DoRA layers that dequantize their weight when their input is known, so that one layer has a dense weight at a time.

mlx-lm's DoRA layer dequantizes its weight in each pass. Without an order MLX may write the dense weights of many layers
first, and where layers are recomputed for the gradient, `mx.compile` keeps those of the forward pass for it.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxflow.ops import mlx_lm_import, patching


def install() -> None:
    """Let DoRA layers of this process, those to come too, dequantize after their input; results are the same."""
    mlx_lm_import.tuner_utils()
    from mlx_lm.tuner.dora import DoRALinear

    patching.install(DoRALinear, "__call__", _ordered(DoRALinear.__call__), by=__name__)


def _ordered(plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def call(layer: Any, x: mx.array) -> mx.array:
        linear = layer.linear
        if not layer._is_quantized():
            return plain(layer, x)
        codes = linear["weight"]
        linear["weight"] = mx.depends([codes], [mx.stop_gradient(x)])[0]
        try:
            return plain(layer, x)
        finally:
            linear["weight"] = codes

    return call
