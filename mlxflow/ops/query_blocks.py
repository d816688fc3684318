"""Any attention by blocks of queries, where all its scores would take much memory.

Attention that computes L x L scores, which plain operations do everywhere and MLX's does in training on Metal and in
fp32 on CUDA, holds several arrays of that size. Here the scores of some queries exist at a time: the gradient computes
each block again, and each block waits for the one before it.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from mlxflow.ops.custom_function import custom_function

#: Takes the arguments of `mx.fast.scaled_dot_product_attention`, and returns its result.
Attention = Callable[..., mx.array]

# Bytes of scores up to which attention is computed at once
_MOST_AT_ONCE = 512 << 20

# Bytes of the scores of a block
_MOST_OF_BLOCK = 128 << 20


def attend(
    attention: Attention,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return what an attention function does, by blocks of queries if its scores would take much memory.

    A mask of floating-point numbers, which may have a gradient, is passed on as a whole.

    Args:
        attention: takes the arguments of `mx.fast.scaled_dot_product_attention`.
        queries: (B, H, L, D).
        keys: (B, K, S, D); K divides H.
        values: (B, K, S, E).
        scale: of the scores.
        mask: as MLX's attention takes it; with "causal" the last query sees all keys.
        sinks: (H,), or None.

    Returns:
        (B, H, L, E)
    """
    named: dict[str, Any] = {} if sinks is None else {"sinks": sinks}
    is_whole = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    if is_whole or not are_many(queries, keys):
        return attention(queries, keys, values, scale=scale, mask=mask, **named)
    rows = max(1, _MOST_OF_BLOCK * queries.shape[2] // _scores_bytes(queries, keys))
    is_causal = isinstance(mask, str)
    others = [*([mask] if isinstance(mask, mx.array) else []), *([] if sinks is None else [sinks])]
    function = _by_blocks(attention, float(scale), rows, is_causal, isinstance(mask, mx.array), str(queries.dtype))
    return function(queries, keys, values, *others)


def are_many(queries: mx.array, keys: mx.array) -> bool:
    """Return whether the scores of an attention take so much memory that it is computed by blocks.

    Args:
        queries: (B, H, L, D).
        keys: (B, K, S, D).
    """
    return _scores_bytes(queries, keys) > _MOST_AT_ONCE


def _scores_bytes(queries: mx.array, keys: mx.array) -> int:
    batch, heads, length, _ = queries.shape
    return batch * heads * length * keys.shape[2] * queries.dtype.size


@functools.cache
def _by_blocks(
    attention: Attention, scale: float, rows: int, is_causal: bool, has_mask: bool, _: str
) -> Callable[..., mx.array]:
    """Return a function of queries, keys, values, and a mask and sinks where there are some, with its gradient."""

    def of_block(part: mx.array | None) -> Callable[..., mx.array]:
        """Return the attention of a block's queries, whose rows of the mask are given."""

        def attended(queries: mx.array, keys: mx.array, values: mx.array, *sinks: mx.array) -> mx.array:
            named = {"sinks": sinks[0]} if sinks else {}
            return attention(queries, keys, values, scale=scale, mask="causal" if is_causal else part, **named)

        return attended

    def forward(queries: mx.array, keys: mx.array, values: mx.array, *others: mx.array) -> mx.array:
        mask, sinks = _parted(others, has_mask)
        outs: list[mx.array] = []
        length, last = queries.shape[2], keys.shape[2]
        for begin in range(0, length, rows):
            end = min(begin + rows, length)
            attended = of_block(None if mask is None else _rows_of(mask, begin, end))
            seen = last - length + end if is_causal else last
            part = queries[:, :, begin:end]
            part = mx.depends([part], [outs[-1]])[0] if outs else part
            outs.append(attended(part, keys[:, :, :seen], values[:, :, :seen], *sinks))
        return mx.concatenate(outs, axis=2)

    function = custom_function(forward)

    @function.vjp
    def gradients(primals: tuple[mx.array, ...], incoming: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        queries, keys, values, *others = primals
        mask, sinks = _parted(others, has_mask)
        length, last = queries.shape[2], keys.shape[2]
        for_queries: list[mx.array] = []
        # sums over the blocks in fp32, of keys, values and sinks
        sums = [mx.zeros(one.shape, mx.float32) for one in (keys, values, *sinks)]
        for begin in range(0, length, rows):
            end = min(begin + rows, length)
            attended = of_block(None if mask is None else _rows_of(mask, begin, end))
            seen = last - length + end if is_causal else last
            part = queries[:, :, begin:end]
            part = mx.depends([part], [for_queries[-1], *sums])[0] if for_queries else part
            inputs = [part, keys[:, :, :seen], values[:, :, :seen], *sinks]
            of_part, *found = mx.vjp(attended, inputs, [incoming[:, :, begin:end]])[1]
            for_queries.append(of_part)
            sums = [_added(total, one) for total, one in zip(sums, found, strict=True)]
        results = [total.astype(one.dtype) for total, one in zip(sums, (keys, values, *sinks), strict=True)]
        of_mask = [] if mask is None else [mx.zeros_like(mask)]
        return mx.concatenate(for_queries, axis=2), *results[:2], *of_mask, *results[2:]

    return cast("Callable[..., mx.array]", function)


def _parted(others: Any, has_mask: bool) -> tuple[mx.array | None, list[mx.array]]:
    return (others[0], list(others[1:])) if has_mask else (None, list(others))


def _rows_of(mask: mx.array, begin: int, end: int) -> mx.array:
    """Return the rows of a mask, (..., L or 1, S), for some queries."""
    return mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., begin:end, :]


def _added(total: mx.array, part: mx.array) -> mx.array:
    """Return a sum, (B, K, S, D) or (H,), with a part of it, whose last keys may be missing."""
    part = part.astype(mx.float32)
    if total.shape == part.shape:
        return total + part
    seen = part.shape[2]
    return mx.concatenate([total[:, :, :seen] + part, total[:, :, seen:]], axis=2)
