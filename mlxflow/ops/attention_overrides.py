"""Attention for training: blockwise causal attention on the CPU, and a deterministic gradient on a GPU.

On the CPU MLX computes all L x L scores of causal attention, masks half of them and takes 13 ns for each exponential.
Here, in fp32, each block of queries is multiplied only with the keys up to its own end, the exponentials are those of
`ops.fast_exp`, and rows are divided by their sums after the product with the values. The backward pass is that of
FlashAttention (Dao et al. 2022, arXiv:2205.14135, algorithm 4), with the exponentials kept instead of recomputed.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import document_mask, patching
from mlxflow.ops.custom_function import custom_function
from mlxflow.ops.eval_mode import evaluating
from mlxflow.ops.fast_exp import LOG2_E, exp2_below

# Queries in a block: fewer waste less on the diagonal, more keep the matrix products large
_BLOCK = 256


#: Takes queries, keys, values, the scale of the scores, and the first key that each query sees, (B, L), or None if that
#: is the first of all; returns causal attention, or None if the arguments are not supported.
Causal = Callable[[mx.array, mx.array, mx.array, float, mx.array | None], mx.array | None]

Attention = Callable[..., mx.array]


@contextmanager
def causal_by_blocks() -> Iterator[None]:
    """Replace `mx.fast.scaled_dot_product_attention` by a blockwise CPU version for causal fp32 calls.

    A function that is traced while the context is open keeps the replacement.
    """

    def by_blocks(plain: Attention, queries: mx.array, keys: mx.array, values: mx.array, **named: Any) -> mx.array:
        if not _is_supported(queries, keys, values, **named):
            return plain(queries, keys, values, **named)
        return causal_attention(queries, keys, values, scale=named["scale"])

    with _replaced(by_blocks):
        yield


@contextmanager
def in_fixed_order(causal: Causal | None, *, only_16_bits: bool = True) -> Iterator[None]:
    """Make the gradient of attention deterministic, for functions traced while the context is open.

    On CUDA MLX uses cuDNN, which accumulates the gradient of the queries with atomics. It is replaced by a kernel, or
    where that does not support the call by plain operations, which hold all L x L scores.

    Args:
        causal: the kernel; None for plain operations everywhere.
        only_16_bits: MLX's attention in fp32 is deterministic, as on CUDA.
    """

    def ordered(plain: Attention, queries: mx.array, keys: mx.array, values: mx.array, **named: Any) -> mx.array:
        is_kept = only_16_bits and queries.dtype not in (mx.bfloat16, mx.float16)
        if is_kept or named.keys() - {"scale", "mask", "sinks"}:
            return plain(queries, keys, values, **named)
        result = None
        if causal is not None and _is_causal(queries, keys, bounds, **named):
            first = bounds.of(named["mask"])
            if first is not None:
                first = mx.broadcast_to(first, (len(queries), queries.shape[2]))
            result = causal(queries, keys, values, named["scale"], first)
        return plain_attention(queries, keys, values, **named) if result is None else result

    with document_mask.noted_bounds() as bounds, _replaced(ordered):
        yield


class Heads(NamedTuple):
    """The attention heads of a model.

    Attributes:
        width: of a head, D.
        is_bounded: a query sees only some of the keys before it: those of its document, or of a window.
    """

    width: int
    is_bounded: bool


def first_causal_heads(model: nn.Module, *, context_length: int, masks_documents: bool) -> Heads | None:
    """Return the heads of the first attention of a model; None if that attention is not causal or there is none.

    The model is called in eval mode up to its first attention; nothing is evaluated.

    Args:
        model: of any architecture.
        context_length: tokens in a row, L.
        masks_documents: no token attends to another document in its row.
    """

    def interrupt(_: Attention, queries: mx.array, keys: mx.array, values: mx.array, **named: Any) -> mx.array:
        is_usable = queries.shape[-1] == values.shape[-1] and _is_causal(queries, keys, bounds, **named)
        raise _FoundError(Heads(queries.shape[-1], bounds.of(named["mask"]) is not None) if is_usable else None)

    tokens = mx.zeros((1, max(2, context_length)), mx.int32)
    try:
        with evaluating(model), document_mask.noted_bounds() as bounds, _replaced(interrupt):
            document_mask.apply(model, tokens, tokens if masks_documents else None)
    except _FoundError as reached:
        heads: Heads | None = reached.args[0]
        return heads
    return None


class _FoundError(Exception):
    """Ends a model's call at its first attention; carries the heads."""


@contextmanager
def _replaced(attention: Callable[..., mx.array]) -> Iterator[None]:
    """Replace MLX's attention by a function that takes MLX's attention and its arguments, until the block ends."""
    replacement = functools.partial(attention, mx.fast.scaled_dot_product_attention)
    with patching.attributes((mx.fast, "scaled_dot_product_attention", replacement), by=__name__):
        yield


def _is_causal(
    queries: mx.array, keys: mx.array, bounds: document_mask.Bounds, *, mask: Any = None, sinks: Any = None, **_: Any
) -> bool:
    is_causal = bounds.of(mask) is not None or (isinstance(mask, str) and mask == "causal")
    return is_causal and queries.shape[2] == keys.shape[2] and sinks is None


def plain_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return the result of `mx.fast.scaled_dot_product_attention`, computed with plain operations.

    Args:
        queries: (B, H, L, D).
        keys: (B, K, S, D); K divides H.
        values: (B, K, S, E).
        scale: of the scores.
        mask: boolean or additive, of a shape that broadcasts to (B, H, L, S); "causal"; or None.
        sinks: (H,), a score for each head that takes part in the softmax and has no value; or None.

    Returns:
        (B, H, L, E)
    """
    batch, heads, length, width = queries.shape
    grouped = (batch, keys.shape[1], heads // keys.shape[1], length)
    scores = (queries * scale).reshape(*grouped, width) @ _transposed(keys[:, :, None])
    scores = scores.reshape(batch, heads, length, -1)
    if isinstance(mask, str):
        places = mx.arange(keys.shape[2])
        mask = places[-length:, None] >= places
    if mask is not None and mask.dtype == mx.bool_:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    if sinks is not None:
        shares = mx.broadcast_to(sinks.astype(scores.dtype)[:, None, None], (batch, heads, length, 1))
        scores = mx.concatenate([shares, scores], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    if sinks is not None:
        weights = weights[..., 1:]
    return (weights.reshape(*grouped, -1) @ values[:, :, None]).reshape(batch, heads, length, -1)


def _is_supported(queries: mx.array, keys: mx.array, values: mx.array, **named: Any) -> bool:
    in_fp32 = queries.dtype == keys.dtype == values.dtype == mx.float32
    is_causal = _is_causal(queries, keys, document_mask.Bounds(), **named)
    return in_fp32 and is_causal and named.keys() - {"mask", "sinks"} == {"scale"}


def causal_attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float) -> mx.array:
    """Return softmax(scale queries keys^T) values, each query over the keys up to its own place.

    Args:
        queries: (B, H, L, D) in fp32.
        keys: (B, K, L, D); K divides H, and H / K consecutive heads of queries share a head of keys.
        values: (B, K, L, E).
        scale: of the scores.

    Returns:
        (B, H, L, E)
    """
    batch, heads, length, _ = queries.shape
    grouped = keys.shape[1]
    # the heads that share a key become rows beside each other
    folded = queries.reshape(batch, grouped, heads // grouped, length, -1)
    out = _causal(float(scale))(folded, keys[:, :, None], values[:, :, None])[0]
    return out.reshape(batch, heads, length, -1)


class _QueryBlock(NamedTuple):
    """What a block of T queries keeps for its gradient.

    Attributes:
        before: exponentials of the scores with the keys before the block, (..., T, begin); None for the first block.
        within: exponentials of the scores with the keys of the block, (..., T, T).
        inverse: reciprocals of the row sums, (..., T, 1).
    """

    before: mx.array | None
    within: mx.array
    inverse: mx.array


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + _BLOCK, length)) for begin in range(0, length, _BLOCK)]


def _with_ones(values: mx.array) -> mx.array:
    """Return values, (..., L, E), with a column of ones: a product with it also yields the row sums."""
    return mx.concatenate([values, mx.ones((*values.shape[:-1], 1))], axis=-1)


def _transposed(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)


@functools.cache
def _causal(scale: float) -> Callable[..., tuple[mx.array, ...]]:
    """Return the function of folded queries, keys and values, (B, K, G or 1, L, D), with its gradient."""
    factor = scale * LOG2_E

    def forward(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        outs, saved = [], []
        values = _with_ones(values)
        for begin, end in _blocks(queries.shape[-2]):
            out, block = _attend(queries[..., begin:end, :], keys[..., :end, :], values[..., :end, :], begin, factor)
            outs.append(out)
            saved += [block.within, block.inverse] + ([] if block.before is None else [block.before])
        return mx.concatenate(outs, axis=-2), *saved

    function = custom_function(forward)

    @function.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        queries, keys, values = primals
        out, *saved = outputs
        values = _with_ones(values)
        query_gradients, key_gradients, value_gradients = [], [], []
        key_sum = value_sum = None  # gradients from later blocks for the keys and values before them
        for begin, end in reversed(_blocks(queries.shape[-2])):
            before = saved.pop() if begin else None
            inverse, within = saved.pop(), saved.pop()
            block = _QueryBlock(before, within, inverse)
            rows = slice(begin, end)
            gradients = _gradients(
                queries[..., rows, :],
                keys[..., :end, :],
                values[..., :end, :],
                out[..., rows, :],
                cotangents[0][..., rows, :],
                block,
                scale,
            )
            query_gradients.append(gradients[0])
            key_total = gradients[1] if key_sum is None else gradients[1] + key_sum
            value_total = gradients[2] if value_sum is None else gradients[2] + value_sum
            key_gradients.append(key_total[..., rows, :])
            value_gradients.append(value_total[..., rows, :])
            key_sum, value_sum = key_total[..., :begin, :], value_total[..., :begin, :]
        joined = (
            mx.concatenate(list(reversed(parts)), axis=-2)
            for parts in (query_gradients, key_gradients, value_gradients)
        )
        return tuple(joined)

    return cast("Callable[..., tuple[mx.array, ...]]", function)


def _attend(
    queries: mx.array, keys: mx.array, values: mx.array, begin: int, factor: float
) -> tuple[mx.array, _QueryBlock]:
    """Return a block's result and what its gradient needs; exponentials are to the base 2, values have their ones."""
    rows = queries.shape[-2]
    sees = mx.arange(rows)[:, None] >= mx.arange(rows)[None]
    within = mx.where(sees, queries @ _transposed(keys[..., begin:, :]), -mx.inf)
    largest = within.max(axis=-1, keepdims=True)
    before = queries @ _transposed(keys[..., :begin, :]) if begin else None
    if before is not None:
        largest = mx.maximum(largest, before.max(axis=-1, keepdims=True))
    within = exp2_below(within, largest, factor) * sees
    result = within @ values[..., begin:, :]
    if before is not None:
        before = exp2_below(before, largest, factor)
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
