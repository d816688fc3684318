"""Causal attention on the CPU by blocks of queries, computed in fp32.

On the CPU MLX computes all L x L scores of causal attention, masks half of them and takes 13 ns for each exponential.
Here each block of queries is multiplied only with the keys up to its own end, the exponentials are those of
`ops.fast_exp`, and rows are divided by their sums after the product with the values. The backward pass is that of
FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 4). The exponentials are kept for it where rows are short;
of long rows each block's are computed again, and the blocks follow each other, so that those of one block exist.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import mlx.core as mx

from mlxflow.ops.custom_function import custom_function
from mlxflow.ops.fast_exp import LOG2_E, exp2_below

# Queries in a block: fewer waste less on the diagonal, more keep the matrix products large
_BLOCK = 256
_LEAST_BLOCK = 8

# Bytes of exponentials that a call keeps for its gradient; with more they are computed again
_MOST_KEPT = 256 << 20

# Bytes of a block's scores where they are computed again
_MOST_HELD = 32 << 20


def causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, first: mx.array | None = None
) -> mx.array:
    """Return softmax(scale queries keys^T) values, each query over the keys up to its own place.

    Args:
        queries: (B, H, L, D) in fp32 or 16 bits, which are computed in fp32 and rounded once.
        keys: (B, K, L, D); K divides H, and H / K consecutive heads of queries share a head of keys.
        values: (B, K, L, E).
        scale: of the scores.
        first: the first key that each query sees, (B or 1, L) in int32; None for the first of all.

    Returns:
        (B, H, L, E), of the queries' dtype.
    """
    batch, heads, length, _ = queries.shape
    grouped = keys.shape[1]
    dtype = queries.dtype
    queries, keys, values = (array.astype(mx.float32) for array in (queries, keys, values))
    # the heads that share a key become rows beside each other
    folded = queries.reshape(batch, grouped, heads // grouped, length, -1)
    bounds = [] if first is None else [first[:, None, None, :, None]]
    division = _Division.of(batch * heads, length)
    out = _causal(float(scale), division, str(dtype))(folded, keys[:, :, None], values[:, :, None], *bounds)[0]
    return out.reshape(batch, heads, length, -1).astype(dtype)


class _Division(NamedTuple):
    """How attention is divided.

    Attributes:
        rows: queries of a block.
        keeps: whether the exponentials are kept for the gradient.
    """

    rows: int
    keeps: bool

    @classmethod
    def of(cls, heads: int, length: int) -> "_Division":
        """Return the division for a number of heads, of all rows, and the tokens of a row."""
        if 2 * heads * length * (length + _BLOCK) <= _MOST_KEPT:
            return cls(_BLOCK, keeps=True)
        rows = _MOST_HELD // (4 * heads * length)
        return cls(max(_LEAST_BLOCK, min(_BLOCK, rows // _LEAST_BLOCK * _LEAST_BLOCK)), keeps=False)

    def blocks(self, length: int) -> list[tuple[int, int]]:
        """Return the first query of each block, and the one after its last."""
        return [(begin, min(begin + self.rows, length)) for begin in range(0, length, self.rows)]


class _QueryBlock(NamedTuple):
    """What a block of T queries needs for its gradient.

    Attributes:
        before: exponentials of the scores with the keys before the block, (..., T, begin); None for the first block.
        within: exponentials of the scores with the keys of the block, (..., T, T).
        inverse: reciprocals of the row sums, (..., T, 1).
    """

    before: mx.array | None
    within: mx.array
    inverse: mx.array


def _with_ones(values: mx.array) -> mx.array:
    """Return values, (..., L, E), with a column of ones: a product with it also yields the row sums."""
    return mx.concatenate([values, mx.ones((*values.shape[:-1], 1))], axis=-1)


def _transposed(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)


@functools.cache
def _causal(scale: float, division: _Division, _: str) -> Callable[..., tuple[mx.array, ...]]:
    """Return the function of folded queries, keys and values, (B, K, G or 1, L, D), with its gradient."""
    factor = scale * LOG2_E

    def forward(queries: mx.array, keys: mx.array, values: mx.array, *first: mx.array) -> tuple[mx.array, ...]:
        outs: list[mx.array] = []
        saved: list[mx.array] = []
        values = _with_ones(values)
        for begin, end in division.blocks(queries.shape[-2]):
            rows = queries[..., begin:end, :]
            if outs and not division.keeps:
                rows = mx.depends([rows], [outs[-1]])[0]
            low = first[0][..., begin:end, :] if first else None
            out, block = _attend(rows, keys[..., :end, :], values[..., :end, :], low, factor)
            outs.append(out)
            if division.keeps:
                saved += [block.within, block.inverse] + ([] if block.before is None else [block.before])
        return mx.concatenate(outs, axis=-2), *saved

    function = custom_function(forward)

    @function.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        queries, keys, values, *first = primals
        out, *saved = outputs
        values = _with_ones(values)
        query_gradients: list[mx.array] = []
        sums: tuple[mx.array, ...] = ()  # of keys and values, over the blocks from the last one on
        for begin, end in reversed(division.blocks(queries.shape[-2])):
            rows = slice(begin, end)
            of_block = queries[..., rows, :]
            if division.keeps:
                before = saved.pop() if begin else None
                inverse, within = saved.pop(), saved.pop()
                block = _QueryBlock(before, within, inverse)
            else:
                of_block = mx.depends([of_block], list(sums))[0] if sums else of_block
                low = first[0][..., rows, :] if first else None
                _, block = _attend(of_block, keys[..., :end, :], values[..., :end, :], low, factor)
            gradients = _gradients(
                of_block,
                keys[..., :end, :],
                values[..., :end, :],
                out[..., rows, :],
                cotangents[0][..., rows, :],
                block,
                scale,
            )
            query_gradients.append(gradients[0])
            sums = tuple(map(_added, sums, gradients[1:])) if sums else gradients[1:]
        joined = mx.concatenate(list(reversed(query_gradients)), axis=-2)
        return joined, *sums, *map(mx.zeros_like, first)

    return cast("Callable[..., tuple[mx.array, ...]]", function)


def _added(total: mx.array, part: mx.array) -> mx.array:
    """Return a sum over keys, (..., L, D), with a part of it for the first of them."""
    end = part.shape[-2]
    return mx.concatenate([part + total[..., :end, :], total[..., end:, :]], axis=-2)


def _attend(
    queries: mx.array, keys: mx.array, values: mx.array, low: mx.array | None, factor: float
) -> tuple[mx.array, _QueryBlock]:
    """Return a block's result and what its gradient needs; exponentials are to the base 2, values have their ones.

    Args:
        queries: (..., T, D), the last of them at the place of the last key.
        keys: (..., S, D).
        values: (..., S, E + 1).
        low: the first key that each query sees, (..., T, 1); None for the first of all.
        factor: of the scores.
    """
    rows = queries.shape[-2]
    begin = keys.shape[-2] - rows
    sees = mx.arange(rows)[:, None] >= mx.arange(rows)[None]
    if low is not None:
        sees = sees & (mx.arange(begin, begin + rows) >= low)
    within = mx.where(sees, queries @ _transposed(keys[..., begin:, :]), -mx.inf)
    largest = within.max(axis=-1, keepdims=True)
    before = queries @ _transposed(keys[..., :begin, :]) if begin else None
    sees_before = mx.arange(begin) >= low if low is not None and begin else None
    if before is not None:
        before = before if sees_before is None else mx.where(sees_before, before, -mx.inf)
        largest = mx.maximum(largest, before.max(axis=-1, keepdims=True))
    within = exp2_below(within, largest, factor) * sees
    result = within @ values[..., begin:, :]
    if before is not None:
        before = exp2_below(before, largest, factor)
        before = before if sees_before is None else before * sees_before
        result = result + before @ values[..., :begin, :]
    inverse = 1 / result[..., -1:] + 0 * largest  # a score that is no number shows
    return result[..., :-1] * inverse, _QueryBlock(before, within, inverse)


def _gradients(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    out: mx.array,
    incoming: mx.array,
    block: _QueryBlock,
    scale: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return a block's gradients for its queries, and for the keys and values up to its end; values have their ones."""
    begin = keys.shape[-2] - queries.shape[-2]
    less_delta = mx.concatenate([incoming, -(incoming * out).sum(axis=-1, keepdims=True)], axis=-1)
    weighted = incoming * block.inverse
    factor = block.inverse * scale  # of each row: on what is small instead of on its scores
    queries = queries * factor

    def of(exponentials: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        scores = exponentials * (less_delta @ _transposed(values))
        return scores @ keys, _over_heads(scores, queries), _over_heads(exponentials, weighted)

    for_queries, for_keys, for_values = of(block.within, keys[..., begin:, :], values[..., begin:, :])
    if block.before is not None:
        more = of(block.before, keys[..., :begin, :], values[..., :begin, :])
        for_queries = for_queries + more[0]
        for_keys = mx.concatenate([more[1], for_keys], axis=-2)
        for_values = mx.concatenate([more[2], for_values], axis=-2)
    return for_queries * factor, for_keys, for_values


def _over_heads(scores: mx.array, rows: mx.array) -> mx.array:
    """Return scores^T rows, summed over the heads that share a key: (B, K, 1, keys, D)."""
    each = _transposed(scores) @ rows
    return each if each.shape[2] == 1 else each.sum(axis=2, keepdims=True)
