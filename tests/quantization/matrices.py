"""Weights to quantize, and what they lose."""

import mlx.core as mx

from mlxflow.quantization.settings import Setting


def awkward() -> mx.array:
    """Return groups with and without far weights, on one side of zero, and all zero, (16, 256)."""
    weight = mx.random.normal((16, 256), key=mx.random.key(0))
    weight[3] = mx.random.laplace((256,), key=mx.random.key(1))
    weight[4] = mx.abs(weight[4]) + 1
    weight[5, ::50] = 9.0
    weight[6] = 0
    return weight


def errors(weight: mx.array, rounded: mx.array, setting: Setting) -> mx.array:
    """Return the squared error of each group."""
    lost = (rounded - weight).astype(mx.float32)
    return lost.square().reshape(-1, setting.group_size).sum(axis=-1)
