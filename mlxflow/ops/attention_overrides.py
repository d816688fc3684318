"""Which attention a training step computes: by blocks on the CPU and for long rows, deterministic on a GPU."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops import document_mask, patching, query_blocks
from mlxflow.ops.blockwise_attention import causal_attention
from mlxflow.ops.eval_mode import evaluating
from mlxflow.ops.query_blocks import Attention

#: Takes queries, keys, values, the scale of the scores, and the first key that each query sees, (B, L), or None if that
#: is the first of all; returns causal attention, or None if the arguments are not supported.
Causal = Callable[[mx.array, mx.array, mx.array, float, mx.array | None], mx.array | None]

_NARROW = (mx.bfloat16, mx.float16)

# Tokens of a row in 16 bits from which fp32 by blocks is faster on the CPU: forward and gradient of 6 heads of 32 with
# 8 tokens take MLX 0.18 ms and blocks 0.23
_LEAST_NARROW = 16

# Widths of heads for which MLX has fused kernels there
_FUSED_ON_METAL = (64, 80, 128)


@contextmanager
def causal_by_blocks(*, only_long: bool = False) -> Iterator[None]:
    """Replace `mx.fast.scaled_dot_product_attention` by a blockwise CPU version for causal calls.

    A query may see the keys of its document or window alone. Other calls that hold many scores are computed by blocks
    of queries. A function that is traced while the context is open keeps the replacement.

    Args:
        only_long: of rows whose scores take much memory; others are left to MLX.
    """

    def by_blocks(plain: Attention, queries: mx.array, keys: mx.array, values: mx.array, **named: Any) -> mx.array:
        if _has_other_arguments(named):
            return plain(queries, keys, values, **named)
        is_left = only_long and not query_blocks.are_many(queries, keys)
        is_left = is_left or (queries.dtype in _NARROW and queries.shape[2] < _LEAST_NARROW)
        is_of_one_type = queries.dtype == keys.dtype == values.dtype
        if is_left or not is_of_one_type or not _is_causal(queries, keys, bounds, **named):
            return query_blocks.attend(plain, queries, keys, values, **named)
        first = bounds.of(named["mask"])
        return causal_attention(queries, keys, values, scale=named["scale"], first=first)

    with document_mask.noted_bounds() as bounds, _replaced(by_blocks):
        yield


@contextmanager
def long_rows_by_blocks() -> Iterator[None]:
    """Let attention that holds many scores be computed by blocks of queries, except MLX's fused one, which holds none.

    MLX fuses attention of 16-bit types on CUDA, and of heads of some widths on Metal.
    """

    def by_blocks(plain: Attention, queries: mx.array, keys: mx.array, values: mx.array, **named: Any) -> mx.array:
        on_metal = queries.shape[-1] == values.shape[-1] and values.shape[-1] in _FUSED_ON_METAL
        is_fused = on_metal if mx.metal.is_available() else queries.dtype in _NARROW
        if is_fused or _has_other_arguments(named):
            return plain(queries, keys, values, **named)
        return query_blocks.attend(plain, queries, keys, values, **named)

    with _replaced(by_blocks):
        yield


@contextmanager
def in_evaluation() -> Iterator[None]:
    """Let attention of long rows be computed by blocks in what has no gradient and is traced until the block ends."""
    with causal_by_blocks(only_long=True) if mx.default_device() == mx.cpu else long_rows_by_blocks():
        yield


@contextmanager
def in_fixed_order(causal: Causal | None, *, only_16_bits: bool = True) -> Iterator[None]:
    """Make the gradient of attention deterministic, for functions traced while the context is open.

    On CUDA MLX uses cuDNN, which accumulates the gradient of the queries with atomics. It is replaced by a kernel, or
    where that does not support the call by plain operations, of long rows by blocks of queries.

    Args:
        causal: the kernel; None for plain operations everywhere.
        only_16_bits: MLX's attention in fp32 is deterministic, as on CUDA.
    """

    def ordered(plain: Attention, queries: mx.array, keys: mx.array, values: mx.array, **named: Any) -> mx.array:
        if _has_other_arguments(named):
            return plain(queries, keys, values, **named)
        if only_16_bits and queries.dtype not in _NARROW:
            return query_blocks.attend(plain, queries, keys, values, **named)
        result = None
        if causal is not None and _is_causal(queries, keys, bounds, **named):
            first = bounds.of(named["mask"])
            if first is not None:
                first = mx.broadcast_to(first, (len(queries), queries.shape[2]))
            result = causal(queries, keys, values, named["scale"], first)
        return query_blocks.attend(plain_attention, queries, keys, values, **named) if result is None else result

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


def _has_other_arguments(named: Mapping[str, Any]) -> bool:
    """Return whether a call of attention has arguments that only MLX's own takes."""
    return bool(named.keys() - {"scale", "mask", "sinks"})


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


def _transposed(x: mx.array) -> mx.array:
    return x.swapaxes(-1, -2)
