"""Grids of the floating-point modes: the values that a code can have, and the scales that a group can have.

"mxfp4" and "mxfp8" (OCP Microscaling Formats 1.0) have elements of 4 bits (E2M1) and 8 bits (E4M3), and for each group
a power of two as the scale. "nvfp4" has E2M1 elements and E4M3 scales. A weight is its element times the scale.
"""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxflow.quantization.codec import Packed, bit_stream
from mlxflow.quantization.settings import Setting
from mlxflow.storage.host_arrays import numpy_of

#: The largest element of each mode.
LARGEST = {"mxfp4": 6.0, "nvfp4": 6.0, "mxfp8": 448.0}

# Powers of two next to that of MLX, and shares of MLX's E4M3 scale, that are tried as the scale of a group
_POWERS = (1.0, 0.5, 2.0)
_SHARES = (1.0, 0.67, 0.73, 0.79, 0.85, 0.91, 0.96, 1.04, 1.1, 1.2, 1.35, 1.5)

# Bias of the exponents of a scale that is a power of two, and the smallest one used: positions must stay finite
_EXPONENT_BIAS, _LEAST_EXPONENT = 127, -100

# The smallest E4M3 scale: 0 would lose a whole group
_LEAST_E4M3 = 2.0**-9


def elements(mode: str) -> NDArray[np.float32]:
    """Return all values of an element of a mode, in increasing order."""
    if mode == "mxfp8":
        half = numpy_of(mx.from_fp8(mx.arange(127, dtype=mx.uint8), mx.float32))
    else:
        half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([-half[:0:-1], half])


def round_elements(positions: mx.array, mode: str) -> mx.array:
    """Return the elements next to positions, weights by their scale, in fp32."""
    if mode == "mxfp8":
        return mx.from_fp8(mx.to_fp8(positions), mx.float32)
    sizes = mx.abs(positions)
    step = mx.where(sizes < 2, 0.5, mx.where(sizes < 4, 1.0, 2.0))
    return mx.sign(positions) * mx.minimum(mx.round(sizes / step) * step, LARGEST[mode])


def pack_elements(positions: mx.array, scales: mx.array, setting: Setting) -> Packed:
    """Return the codes of weights.

    Args:
        positions: weights by their scale, (..., N).
        scales: that a group can have, (..., N / G), in fp32; see `stored_scales`.
        setting: of a floating-point mode.
    """
    values = round_elements(positions, setting.mode)
    if setting.mode == "mxfp8":
        words = mx.to_fp8(values).view(mx.uint32)
    else:
        sizes = mx.abs(values)
        codes = mx.where(sizes < 2, 2 * sizes, mx.where(sizes < 4, sizes + 2, sizes / 2 + 4)).astype(mx.uint32)
        codes = codes | ((values < 0).astype(mx.uint32) << 3)
        words = bit_stream(codes.reshape(*codes.shape[:-1], -1, 32), setting.bits).reshape(*positions.shape[:-1], -1)
    if setting.mode == "nvfp4":
        return Packed(words, mx.to_fp8(scales), None)
    return Packed(words, (mx.round(mx.log2(scales)) + _EXPONENT_BIAS).astype(mx.uint8), None)


def decoded_scales(scales: mx.array, setting: Setting) -> mx.array:
    """Return stored scales, (..., N / G) in uint8, as numbers in fp32."""
    if setting.mode == "nvfp4":
        return mx.from_fp8(scales, mx.float32)
    return mx.power(2.0, scales.astype(mx.float32) - _EXPONENT_BIAS)


def stored_scales(scales: mx.array, setting: Setting) -> mx.array:
    """Return the nearest scales that a group can have, in fp32."""
    if setting.mode == "nvfp4":
        return mx.maximum(mx.from_fp8(mx.to_fp8(scales), mx.float32), _LEAST_E4M3)
    exponents = mx.clip(mx.round(mx.log2(scales)), _LEAST_EXPONENT, _EXPONENT_BIAS)
    return mx.power(2.0, exponents)


def best_scales(weight: mx.array, setting: Setting) -> mx.array:
    """Return for each group the scale with the least squared error among those near MLX's, never worse than MLX's.

    Args:
        weight: (..., N); the group size G divides N.
        setting: of a floating-point mode.

    Returns:
        Scales, (..., N / G), in fp32.
    """
    groups = weight.astype(mx.float32).reshape(*weight.shape[:-1], -1, setting.group_size)
    _, scales = mx.quantize(weight, group_size=setting.group_size, bits=setting.bits, mode=setting.mode)[:2]
    first = decoded_scales(scales, setting)
    best, least = stored_scales(mx.where(first > 0, first, _LEAST_E4M3), setting), mx.full(first.shape, mx.inf)
    begin = best
    for factor in _SHARES if setting.mode == "nvfp4" else _POWERS:
        tried = stored_scales(begin * factor, setting)
        rounded = round_elements(groups / tried[..., None], setting.mode) * tried[..., None]
        error = (rounded - groups).square().sum(axis=-1)
        best, least = mx.where(error < least, tried, best), mx.minimum(error, least)
        mx.eval(best, least)  # else the graph would hold the codes of every trial
    return best
