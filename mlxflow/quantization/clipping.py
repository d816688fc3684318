"""Clipping limits for each group of weights that minimize the error after rounding.

Used for the modes whose scales MLX computes from the extreme weights (mxfp4, mxfp8, nvfp4), where one outlier makes all
other weights coarse. OmniQuant learns such limits (Shao et al. 2023, arXiv:2308.13137); here they are searched, as in
AWQ.
"""

import mlx.core as mx

from mlxflow.quantization.codec import round_trip
from mlxflow.quantization.settings import Setting

#: The smallest share of a range that is tried, by bits: below it, clipping costs more than it saves.
_LEAST_SHARE = {4: 0.65, 8: 0.93}
_SHARES = 12


def clip(weight: mx.array, limits: mx.array) -> mx.array:
    """Return a matrix, (..., N), with each group clipped to its limits, (2, ..., N / G, 1)."""
    groups = weight.reshape(*limits.shape[1:-1], -1)
    return mx.clip(groups, limits[0], limits[1]).reshape(weight.shape)


def where_kept(weight: mx.array, limits: mx.array, gradient: mx.array) -> mx.array:
    """Return the gradient of `clip`: the incoming one, (..., N), where the weight is within its limits, else 0."""
    groups, incoming = (one.reshape(*limits.shape[1:-1], -1) for one in (weight, gradient))
    is_kept = (groups >= limits[0]) & (groups <= limits[1])
    return mx.where(is_kept, incoming, 0).reshape(gradient.shape)


def best_limits(weight: mx.array, setting: Setting) -> mx.array:
    """Return for each group the limits with the least squared error of its rounded weights.

    Shares of the smallest and the largest weight are tried: of both at once, then of each by itself.

    Args:
        weight: (..., N); the group size divides N.
        setting: of mode "mxfp4", "mxfp8" or "nvfp4".

    Returns:
        Lower and upper limits, (2, ..., N / G, 1), in the dtype of the weights.
    """
    groups = weight.reshape(*weight.shape[:-1], -1, setting.group_size)
    whole = mx.stack([groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)])

    def error_of(limits: mx.array) -> mx.array:
        lost = (round_trip(clip(weight, limits), setting) - weight).astype(mx.float32)
        return lost.reshape(groups.shape).square().sum(axis=-1, keepdims=True)

    best, least = whole, error_of(whole)
    share_step = (1 - _LEAST_SHARE[setting.bits]) / _SHARES
    cut = [whole * (1 - share_step * number) for number in range(1, _SHARES + 1)]
    for moves_low, moves_high in ((True, True), (True, False), (False, True)):
        for one in cut:
            tried = mx.stack([(one if moves_low else best)[0], (one if moves_high else best)[1]])
            error = error_of(tried)
            best, least = mx.where(error < least, tried, best), mx.minimum(error, least)
            mx.eval(best, least)  # else the graph would hold the codes of every trial
    return best
