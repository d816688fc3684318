"""Least-squares grids for affine quantization: a scale and a bias for each group, not tied to its extreme weights.

MLX's grid of a group spans all of its weights and contains zero. With few codes the error is smaller if the grid is
narrower and centered on the weights; the stored format is the same.
"""

import itertools
from collections.abc import Callable
from functools import cache

import mlx.core as mx

from mlxflow.quantization.codec import codes_on, mlx_grid, places_on
from mlxflow.quantization.settings import Setting

#: The smallest share of a group's range that a grid may span, by bits: below it, clipping costs more than it saves.
_LEAST_SHARE = {2: 0.4, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.8, 8: 0.9}
_SHARES = 10

# Shares of the rest of the range that lie below the grid
_SHARES_BELOW = (0.5, 0.3, 0.7)

_REFITS = 6


def best_grid(weight: mx.array, setting: Setting) -> mx.array:
    """Return for each group a grid with nearly the least squared error, never worse than MLX's.

    Several shares of the range are tried. From the best one, codes and a grid fitted to them are computed alternately,
    as in Lloyd 1982 (Least squares quantization in PCM, IEEE Trans. Inf. Theory 28(2)), but with equal steps.

    Args:
        weight: (..., N); the group size G divides N.
        setting: of mode "affine".

    Returns:
        Scales and biases, (2, ..., N / G), in the dtype of `codec.scales_dtype`.
    """
    groups = weight.reshape(*weight.shape[:-1], -1, setting.group_size)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    best, least = mlx_grid(weight, setting), mx.full(low.shape, mx.inf)
    closer = _closer(setting.bits)
    best, least, _ = closer(groups, best, best, least)
    step = (1 - _LEAST_SHARE[setting.bits]) / (_SHARES - 1)
    for number, below in itertools.product(range(_SHARES), _SHARES_BELOW):
        left_out = number * step
        span = (high - low) * (1 - left_out)
        tried = mx.stack([span / (2**setting.bits - 1), low + (high - low) * (left_out * below)]).astype(best.dtype)
        best, least, _ = closer(groups, tried, best, least)
        mx.eval(best, least)  # else the graph would hold the codes of every trial
    tried = best
    for _ in range(_REFITS + 1):
        best, least, tried = closer(groups, tried, best, least)
        mx.eval(best, least, tried)
    return best


def round_on(weight: mx.array, setting: Setting, grid: mx.array) -> mx.array:
    """Return a matrix rounded to a grid, in its own dtype; equal to packing and unpacking it.

    MLX's dequantization is applied to codes of one byte each, so nothing is packed.
    """
    codes = codes_on(_in_groups(weight, grid), grid, setting.bits).astype(mx.uint8)
    scales, biases = grid.astype(weight.dtype)
    words = codes.reshape(weight.shape).view(mx.uint32)
    return mx.dequantize(words, scales, biases, group_size=setting.group_size, bits=8)


def where_on(weight: mx.array, setting: Setting, grid: mx.array, gradient: mx.array) -> mx.array:
    """Return a gradient, (..., N), with zeros where a weight is more than half a step outside of the grid."""
    places = places_on(_in_groups(weight, grid), grid)
    is_on = mx.abs(places - (2**setting.bits - 1) / 2) <= 2**setting.bits / 2
    return mx.where(is_on, _in_groups(gradient, grid), 0).reshape(gradient.shape)


def _in_groups(matrix: mx.array, grid: mx.array) -> mx.array:
    return matrix.reshape(*grid.shape[1:], -1)


@cache
def _closer(bits: int) -> Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array, mx.array]]:
    """Return a function that compares grids, (2, ...), with the best ones so far and their errors, (...).

    It returns the better grids, their errors, and grids fitted to the codes of the compared ones.
    """

    def one(groups: mx.array, grid: mx.array, best: mx.array, least: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        weights, codes = groups.astype(mx.float32), codes_on(groups, grid, bits)
        scales, biases = grid.astype(groups.dtype)[..., None]
        rounded = codes.astype(groups.dtype) * scales + biases  # in MLX's dtype
        error = (rounded.astype(mx.float32) - weights).square().sum(axis=-1)
        apart = codes - codes.mean(axis=-1, keepdims=True)
        spread = apart.square().sum(axis=-1, keepdims=True)
        slope = mx.where(spread > 0, (apart * weights).sum(axis=-1, keepdims=True) / mx.maximum(spread, 0.1), scales)
        fitted = mx.stack([slope, (weights - codes * slope).mean(axis=-1, keepdims=True)]).squeeze(-1)
        return mx.where(error < least, grid, best), mx.minimum(error, least), fitted.astype(grid.dtype)

    return mx.compile(one)
