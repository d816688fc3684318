"""The grid of a matrix in any mode: scales and biases of its groups, and codes on them.

Affine and symmetric codes are whole numbers; those of the floating-point modes are elements (`float_grid`), and their
biases are zero.
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxflow.quantization import float_grid
from mlxflow.quantization.affine_grid import best_grid
from mlxflow.quantization.codec import Packed, pack, symmetric_grid, unpack
from mlxflow.quantization.settings import Setting

# Numbers of a matrix whose grids are searched at a time: intermediate results are ten times as large
_NUMBERS_AT_ONCE = 1 << 24

# The scale 1 as it is stored in the floating-point modes
_ONE = {"mxfp4": 127, "mxfp8": 127, "nvfp4": 56}


def is_float(setting: Setting) -> bool:
    """Return whether a setting is of a floating-point mode."""
    return setting.stored_mode != "affine"


def first_grid(weight: mx.array, setting: Setting) -> mx.array:
    """Return the scales and biases of each group with nearly the least squared error, (2, ..., N / G).

    Args:
        weight: (..., N); the group size G divides N.
        setting: of any mode.
    """
    width = weight.shape[-1]
    rows = weight.reshape(-1, width)
    step = max(1, _NUMBERS_AT_ONCE // width)
    parts = [_best(rows[begin : begin + step], setting) for begin in range(0, len(rows), step)]
    return mx.concatenate(parts, axis=1).reshape(2, *weight.shape[:-1], -1)


def _best(rows: mx.array, setting: Setting) -> mx.array:
    if is_float(setting):
        scales = float_grid.best_scales(rows, setting)
        grid = mx.stack([scales, mx.zeros_like(scales)])
    else:
        grid = (symmetric_grid if setting.mode == "symmetric" else best_grid)(rows, setting)
    mx.eval(grid)
    return grid


def pack_on(weight: mx.array, setting: Setting, grid: mx.array) -> Packed:
    """Return the codes of a matrix on a grid.

    Args:
        weight: (..., N).
        setting: of any mode.
        grid: as it will be stored, (2, ..., N / G).
    """
    if not is_float(setting):
        return pack(weight, setting, grid)
    groups = weight.astype(mx.float32).reshape(*grid.shape[1:], -1)
    return float_grid.pack_elements((groups / grid[0][..., None]).reshape(weight.shape), grid[0], setting)


def nearest(setting: Setting) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return a function of positions, weights in units of their scale without bias, that rounds them to codes.

    Its results are arrays of their own.
    """
    if not is_float(setting):
        return partial(_nearest_whole, last=np.float32(2**setting.bits - 1))
    values = float_grid.elements(setting.mode)
    middles = (values[1:] + values[:-1]) / 2
    return lambda positions: values[np.searchsorted(middles, positions)]


def _nearest_whole(positions: NDArray[np.float32], *, last: np.float32) -> NDArray[np.float32]:
    codes = np.rint(positions)
    np.maximum(codes, np.float32(0), out=codes)
    return np.minimum(codes, last, out=codes)


def codes_of(packed: Packed, setting: Setting) -> mx.array:
    """Return the codes of a packed matrix as numbers in fp32, (..., N)."""
    if is_float(setting):
        scales, biases = mx.full(packed.scales.shape, _ONE[setting.mode], mx.uint8), None
    else:
        scales = mx.ones(packed.scales.shape, mx.float32)
        biases = mx.zeros_like(scales)
    return unpack(Packed(packed.weight, scales, biases), setting, mx.float32)


def grid_of(packed: Packed, setting: Setting) -> mx.array:
    """Return the scales and biases of a packed matrix in fp32, (2, ..., N / G)."""
    if packed.biases is None:
        scales = float_grid.decoded_scales(packed.scales, setting)
        return mx.stack([scales, mx.zeros_like(scales)])
    return mx.stack([packed.scales.astype(mx.float32), packed.biases.astype(mx.float32)])
