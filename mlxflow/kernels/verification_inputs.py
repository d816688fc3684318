"""Random inputs with which kernels are verified and timed.

They hold zero, tiny and large rows, partial blocks and repeated indices. Each function takes `size`, the number of
elements wanted, and returns arrays of about that size.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

Arrays = Sequence[mx.array]

#: Base of the rotary angles.
ROTARY_BASE = 10_000.0

#: Up to this size every value is compared and nothing is timed.
_AWKWARD = 1 << 20

# Rows of the embedding table, and its numbers where rows are wide
_TABLE_ROWS, _TABLE_NUMBERS = 32_768, 32_768 * 576


def _random_array(shape: tuple[int, ...], seed: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def normal(dtype: mx.Dtype, count: int, size: int) -> Arrays:
    """Return matrices with large, tiny and zero rows."""
    width = 1024
    sizes = _row_scales(max(2, size // width))
    return [(_random_array((len(sizes), width), seed, mx.float32) * sizes).astype(dtype) for seed in range(count)]


def flat(dtype: mx.Dtype, size: int) -> Arrays:
    """Return one array, (N,), with large, tiny and zero numbers."""
    return [(_random_array((size,), 0, mx.float32) * _cycled([1.0, 1e-3, 30.0, 0.0, 1.0], size)).astype(dtype)]


def _row_scales(rows: int) -> mx.array:
    """Return (rows, 1): mostly 1, some rows tiny, some large, some zero."""
    return _cycled([1.0, 1.0, 1e-3, 1.0, 30.0, 0.0, 1.0], rows)[:, None]


def _cycled(values: list[float], count: int) -> mx.array:
    """Repeat values up to a length, (N,); without indexing, which MLX compiles on CUDA for seconds."""
    return mx.tile(mx.array(values), -(-count // len(values)))[:count]


def norm(dtype: mx.Dtype, width: int, size: int) -> Arrays:
    """Return rows, (N, D), a weight, (D,), and an incoming gradient, (N, D)."""
    rows = min(max(3, size // width), 16_384)  # MLX chooses its kernel by the number of rows: use that of training
    scales = _row_scales(rows)
    x = (_random_array((rows, width), 0, mx.float32) * scales * scales).astype(dtype)
    return [x, 1 + _random_array((width,), 1, dtype) * 0.2, _random_array((rows, width), 2, dtype)]


def residual_norm(dtype: mx.Dtype, width: int, size: int) -> Arrays:
    """Return rows, the residual branch, a weight, and the incoming gradients of the sum and of its norm."""
    x, w, g = norm(dtype, width, size)
    r, e = (_random_array(x.shape, seed, dtype) * _row_scales(len(x)).astype(dtype) for seed in (3, 4))
    return [x, r, w, e, g]


def rotary(dtype: mx.Dtype, width: int, size: int, *, head_width: int | None = None) -> Arrays:
    """Return queries in the layout of a projection, their incoming gradient, cosines and sines; heads are scaled.

    Args:
        dtype: of queries and gradient.
        width: rotated dimensions of a head.
        size: number of elements.
        head_width: dimensions of a head; None for `width`.
    """
    heads = 9
    head_width = head_width or width
    length = max(4, min(1024, size // (heads * head_width)))
    batch = max(1, size // (heads * head_width * length))
    scales = mx.array([1.0, 30.0, 1e-3, 1.0, 0.0, 1.0, 1.0, 1e3, 1.0])[:, None]
    x, g = (
        (_random_array((batch, length, heads, head_width), seed, mx.float32) * scales)
        .astype(dtype)
        .transpose(0, 2, 1, 3)
        for seed in (0, 1)
    )
    angles = np.arange(length)[:, None] * ROTARY_BASE ** (-np.arange(width // 2) * 2 / width)
    return [x, g, *(mx.array(found.astype(np.float32)) for found in (np.cos(angles), np.sin(angles)))]


def attention(dtype: mx.Dtype, width: int, is_bounded: bool, size: int, *, length: int | None = None) -> Arrays:
    """Return queries, keys, values, the incoming gradient, and with bounds each query's first key.

    Heads are scaled; the last block is partial.

    Args:
        dtype: of queries, keys, values and gradient.
        width: of a head.
        is_bounded: whether queries see only the keys from a first key on.
        size: number of elements.
        length: tokens of a row; None for some that suit the size.
    """
    length = length or (333 if size > _AWKWARD else 77)
    batch = max(1, size // (6 * length * width))
    scales = ([1.0, 2.0, 1e-3, 1.0, 0.0, 3.0], [1.0, 0.5], [1.0, 30.0], [1.0, 1e3, 1.0, 1e-3, 1.0, 1.0])
    arrays = []
    for seed, each in enumerate(scales):
        x = _random_array((batch, length, len(each), width), seed, mx.float32) * mx.array(each)[:, None]
        arrays.append(x.astype(dtype).transpose(0, 2, 1, 3))
    if is_bounded:  # by documents of 1 to 150 tokens, a long one in long rows, and in some rows by a window
        places = np.arange(length)[None]
        short = [63, 64, 70, 140, 180, 330] if length < 1024 else [length - 40]
        begins = np.array([0, 1, 2, 30, *short])
        document = np.where(places[..., None] >= begins, begins, 0).max(axis=-1)
        is_window = np.arange(batch)[:, None] % 3 == 2
        arrays.append(mx.array(np.where(is_window, np.maximum(places - 40, 0), document).astype(np.int32)))
    return arrays


def table_rows(width: int) -> int:
    """Return the rows of the embedding table of a width."""
    return min(_TABLE_ROWS, _TABLE_NUMBERS // width)


def embedding(dtype: mx.Dtype, size: int, *, width: int = 576) -> Arrays:
    """Return token ids, some absent, repeated or frequent, and the incoming gradient of their rows."""
    rows, most = max(8, size // width), table_rows(width)
    numbers = np.random.default_rng(1).integers(0, most, rows, np.int32)
    numbers[:: max(2, min(16, rows // 60))] = 3
    numbers[1:24:2] = 5
    numbers[:3] = 0, most - 1, most - 1
    return [mx.array(numbers), (_random_array((rows, width), 0, mx.float32) * _row_scales(rows)).astype(dtype)]


def cross_entropy(dtype: mx.Dtype, size: int, *, width: int = 4096) -> Arrays:
    """Return logits, (N, V), their log-sum-exp, targets and weights, (N,) each."""
    rows = max(4, size // width)
    logits = (_random_array((rows, width), 0, mx.float32) * (1 + _row_scales(rows))).astype(dtype)
    targets = np.random.default_rng(1).integers(0, width, rows, np.int32)
    targets[:2] = 0, width - 1
    weights = np.where(np.arange(rows) % 5 == 0, 0, 0.5).astype(np.float32)
    return [logits, mx.logsumexp(logits.astype(mx.float32), axis=-1), mx.array(targets), mx.array(weights)]


def adamw(weights: mx.Dtype, gradients: mx.Dtype, size: int) -> Arrays:
    """Return weights, a gradient, both moments and the scalars of an update; the last vector of eight is partial."""
    size = size // 8 * 8 + 3
    moments = [_random_array((size,), seed, weights) * 1e-2 for seed in (2, 3)]
    gradient = _random_array((size,), 1, gradients) * _cycled([1e-3, 1.0, 1e-6, 0.0, 1e3], size)
    scalars = [mx.array(0.01), mx.array(0.5), mx.array(True), mx.array(1.0), mx.array(1.5)]
    return [_random_array((size,), 0, weights), gradient.astype(gradients), moments[0], moments[1].square(), *scalars]
