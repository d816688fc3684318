"""Causal attention on CUDA, forward and backward, with a fixed order of additions.

For queries Q, keys K and values V, (L, D) each, and the scale s of the scores (Dao 2023, arXiv:2307.08691):

    P = softmax over the keys that a query sees of s Q K^T        O = P V
    dV = P^T dO      dS = P * (dO V^T - rows' sums of dO * O)      dQ = s dS K      dK = s dS^T Q

A query sees the keys up to its own position, all of them or those from a first key on: the beginning of its document
or of its window. Blocks that no query sees are skipped. No L x L array is stored: the forward pass saves the
log-sum-exp of each row, from which the backward pass recomputes P. cuDNN, which MLX uses on CUDA, adds each block of
keys to the gradient of the queries by atomics, so two runs differ. Here one kernel computes the queries' gradient, each
group of threads iterating over the keys, and another that of keys and values, each group iterating over the queries of
all heads that share them: seven products instead of five, and no array that two groups add to. This kernel
has no Metal source; `repeatability` checks MLX's attention there.

| takes | |
| --- | --- |
| Q, dO, O | bf16, (B, H, L, D), D a multiple of 16 up to 128, less than 2^31 numbers |
| K, V | bf16, (B, H / G, L, D) |
| the first keys seen | int32, (B, L), that of a query not before that of the query before it |

They are read in the order (B, L, H, D), in which projections and rotary embeddings leave them.
"""

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mlxflow.kernels.attention_source import BACKWARD_KEYS, BACKWARD_QUERIES, FORWARD
from mlxflow.kernels.codegen import KernelSource
from mlxflow.ops.custom_function import custom_function


class Tiling(NamedTuple):
    """How a kernel's work is divided; the fastest choice on an H100.

    Attributes:
        warps: of a group; each has 16 rows.
        resident: groups that share a processor.
        part: columns of scores that a warp holds at a time.
        holds: whether a warp's own rows stay in its registers.
    """

    warps: int
    resident: int
    part: int = 64
    holds: bool = True


#: Rows of a block that is read while another is computed.
_BLOCK = 64

#: By the largest head width: forward, gradient of the queries, gradient of keys and values.
_TILINGS = {
    64: (Tiling(4, 3), Tiling(4, 3, 32), Tiling(4, 3, 32)),
    128: (Tiling(4, 2), Tiling(4, 2, holds=False), Tiling(4, 2, holds=False)),
}


def reference(
    q: mx.array, k: mx.array, v: mx.array, scale: float, low: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Return each query's mean of values and log2 of its sum of exponentials, in plain operations.

    Args:
        q: (B, H, L, D).
        k: (B, H / G, L, D).
        v: as k.
        scale: of the scores.
        low: the first key that each query sees, (B, L); None for the first of all.

    Returns:
        (B, H, L, D), and (B, H, L) in fp32.
    """
    scores = _scores(q, k, scale, low)
    weights = mx.softmax(scores, axis=-1, precise=True)
    lse = mx.logsumexp(scores.astype(mx.float32), axis=-1) * _LOG2_E
    return (weights @ v[:, :, None]).reshape(q.shape), lse.reshape(q.shape[:3])


def reference_gradients(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    out: mx.array,
    lse: mx.array,
    incoming: mx.array,
    low: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of Q, K and V in plain operations; arguments as those of `kernel_gradients`."""
    batch, heads, length, width = q.shape
    grouped = (batch, k.shape[1], heads // k.shape[1], length)
    given, wide = incoming.reshape(*grouped, width), mx.float32
    weights = mx.exp(_scores(q, k, scale, low).astype(wide) - lse.reshape(*grouped, 1) / _LOG2_E)
    delta = (incoming.astype(wide) * out.astype(wide)).sum(axis=-1).reshape(*grouped, 1)
    scores = (weights * ((given @ v[:, :, None].swapaxes(-1, -2)).astype(wide) - delta) * scale).astype(q.dtype)
    for_values = weights.astype(q.dtype).swapaxes(-1, -2) @ given
    for_keys = scores.swapaxes(-1, -2) @ q.reshape(*grouped, width)
    return (scores @ k[:, :, None]).reshape(q.shape), for_keys.sum(axis=2), for_values.sum(axis=2)


def _scores(q: mx.array, k: mx.array, scale: float, low: mx.array | None) -> mx.array:
    """Return (B, H / G, G, L, L)."""
    batch, _, length, width = q.shape
    scores = (q * scale).reshape(batch, k.shape[1], -1, length, width) @ k[:, :, None].swapaxes(-1, -2)
    places = mx.arange(length)
    sees = places[:, None] >= places
    if low is not None:
        sees = sees & (places >= low[:, None, None, :, None])
    return mx.where(sees, scores, mx.finfo(scores.dtype).min)


_LOG2_E = 1.4426950408889634


def supports(q: mx.array, k: mx.array, v: mx.array, scale: float, low: mx.array | None = None) -> bool:
    """Return whether the kernels take arrays of these shapes and types."""
    is_bf16 = q.dtype == k.dtype == v.dtype == mx.bfloat16
    if not is_bf16 or q.ndim != 4 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        return False
    if low is not None and (low.dtype != mx.int32 or low.shape != (q.shape[0], q.shape[2])):
        return False
    is_supported = q.shape[3] % 16 == 0 and q.shape[3] <= 128 and q.shape[1] % k.shape[1] == 0
    return is_supported and scale > 0 and 0 < q.size < 2**31


def kernel(
    q: mx.array, k: mx.array, v: mx.array, scale: float, low: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Return what `reference` does, by the kernel; the first in memory (B, L, H, D)."""
    out, lse = _launch(
        FORWARD,
        _tilings(q)[0],
        q,
        k,
        scale,
        inputs=[_rows(q), _rows(k), _rows(v)],
        low=low,
        outputs=[(_rows_shape(q), q.dtype), (q.shape[:3], mx.float32)],
    )
    return _heads(out, q), lse


def kernel_gradients(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    out: mx.array,
    lse: mx.array,
    incoming: mx.array,
    low: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of Q, K and V, by the kernels, in memory (B, L, H, D).

    Args:
        q: (B, H, L, D).
        k: (B, H / G, L, D).
        v: as k.
        scale: of the scores.
        out: of `kernel`.
        lse: of `kernel`.
        incoming: the gradient of `out`.
        low: see `reference`.
    """
    _, for_queries, for_keys = _tilings(q)
    rows, keys, values, given = (_rows(array) for array in (q, k, v, incoming))
    dq, delta = _launch(
        BACKWARD_QUERIES,
        for_queries,
        q,
        k,
        scale,
        inputs=[rows, keys, values, _rows(out), given, lse],
        low=low,
        outputs=[(_rows_shape(q), q.dtype), (lse.shape, mx.float32)],
    )
    dk, dv = _launch(
        BACKWARD_KEYS,
        for_keys,
        q,
        k,
        scale,
        inputs=[rows, keys, values, given, lse, delta],
        low=low,
        outputs=[(_rows_shape(k), k.dtype)] * 2,
    )
    return _heads(dq, q), _heads(dk, k), _heads(dv, v)


def _tilings(q: mx.array) -> tuple[Tiling, Tiling, Tiling]:
    return _TILINGS[64 if q.shape[3] <= 64 else 128]


def _launch(
    sources: tuple[KernelSource, KernelSource],
    tiling: Tiling,
    q: mx.array,
    k: mx.array,
    scale: float,
    *,
    inputs: Sequence[mx.array],
    low: mx.array | None,
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
) -> list[mx.array]:
    """Launch a kernel.

    Args:
        sources: of the kernel, without first keys and with them.
        tiling: how its work is divided.
        q: (B, H, L, D).
        k: (B, H / G, L, D).
        scale: of the scores.
        inputs: of the kernel.
        low: see `reference`.
        outputs: shapes and types.
    """
    batch, heads, length, width = q.shape
    owners = k.shape[1] if sources is BACKWARD_KEYS else heads
    own_tiles = 1 if sources is FORWARD else 2
    row_bytes = 128 if width <= 64 else 256
    return sources[low is not None].launch(
        [*inputs, *([] if low is None else [low])],
        constants=[
            ("D", width),
            ("HEADS", heads),
            ("SHARED_BY", heads // k.shape[1]),
            ("SCALE", struct.unpack("i", struct.pack("f", scale))[0]),
            ("WARPS", tiling.warps),
            ("KEYS", _BLOCK),
            ("QUERIES", _BLOCK),
            ("PART", tiling.part),
            ("HOLDS", tiling.holds),
        ],
        groups=batch * owners * -(-length // (16 * tiling.warps)),
        shapes=[shape for shape, _ in outputs],
        dtypes=[dtype for _, dtype in outputs],
        threads=32 * tiling.warps,
        resident=tiling.resident,
        # own rows, two pairs of blocks, and three numbers for each row of two blocks
        shared_bytes=row_bytes * (own_tiles * 16 * tiling.warps + 4 * _BLOCK) + 24 * _BLOCK,
    )


def _rows_shape(x: mx.array) -> tuple[int, int]:
    batch, heads, length, width = x.shape
    return batch, length * heads * width


def _rows(x: mx.array) -> mx.array:
    return x.transpose(0, 2, 1, 3).reshape(_rows_shape(x))


def _heads(rows: mx.array, like: mx.array) -> mx.array:
    batch, heads, length, width = like.shape
    return rows.reshape(batch, length, heads, width).transpose(0, 2, 1, 3)


@functools.cache
def attention(scale: float) -> Callable[..., mx.array]:
    """Return a differentiable function of Q, K and V, and of first keys if there are any, that the kernels take.

    Args:
        scale: of the scores.
    """

    def forward(q: mx.array, k: mx.array, v: mx.array, *low: mx.array) -> tuple[mx.array, mx.array]:
        return kernel(q, k, v, scale, *low)

    function = custom_function(forward)

    @function.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        q, k, v, *low = primals
        out, lse = outputs
        gradients = kernel_gradients(q, k, v, scale, out, lse, cotangents[0], *low)
        return *gradients, *(mx.zeros_like(array) for array in low)

    return lambda *inputs: cast("tuple[mx.array, ...]", function(*inputs))[0]
