"""Every operation that has a kernel, as the self-proof sees it: inputs, kernel, reference, and MLX's own way."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxflow.kernels import adamw, attention, cross_entropy, embedding, gated_activation, rms_norm, rotary
from mlxflow.kernels.kernel_names import TYPES
from mlxflow.ops.embedding_lookup import ordered_gradient

Arrays = Sequence[mx.array]

_EPS = 1e-5
_SETTINGS = adamw.Settings(b1=0.9, b2=0.95, eps=1e-8, decay=0.1)


class Operation(NamedTuple):
    """One kernel in one type and width.

    Attributes:
        inputs: takes a number of numbers; returns inputs of about that size, awkward ones among them.
        kernel: what is to be proved.
        reference: the same in plain operations and fp32.
        own: MLX's own way to the same, to be faster than.
        tolerance: of a result, relative to the largest number in its row.
        is_compiled: whether the kernel's time is that of a compiled function, as MLX's own way is one.
    """

    inputs: Callable[[int], Arrays]
    kernel: Callable[..., Arrays]
    reference: Callable[..., Arrays]
    own: Callable[..., Arrays]
    tolerance: float
    is_compiled: bool = True


def operation(name: str) -> Operation:
    """Return the operation of a name.

    Raises:
        KeyError: there is none.
    """
    kind, *parts = name.split("/")
    found = [make for prefix, make in _MAKERS.items() if kind.startswith(prefix)]
    if not found:
        raise KeyError(name)
    return found[0](kind, TYPES[parts[0]], parts[1:])


def _tolerance(dtype: mx.Dtype) -> float:
    return 2e-5 if dtype == mx.float32 else 2**-7


def _norm(_: str, dtype: mx.Dtype, rest: Sequence[str]) -> Operation:
    own = partial(_norm_and_gradients, lambda x, w: mx.fast.rms_norm(x, w, _EPS))
    inputs = partial(_norm_inputs, dtype, int(rest[0]))
    return Operation(inputs, _norm_kernel, _norm_reference, mx.compile(own), _tolerance(dtype))


def _sum(_: str, dtype: mx.Dtype, rest: Sequence[str]) -> Operation:
    inputs = partial(_sum_inputs, dtype, int(rest[0]))
    return Operation(inputs, _sum_kernel, _sum_reference, _sum_own, _tolerance(dtype))


def _gated(kind: str, dtype: mx.Dtype, _: Sequence[str]) -> Operation:
    form, _, activation = kind.partition("_")
    gated_activation.ACTIVATIONS[activation]
    return Operation(
        partial(_normal, dtype, 3),
        partial(gated_activation.kernel_gradients if form == "gated" else _joined_gradients, activation),
        partial(_wide, partial(gated_activation.reference_gradients, activation)),
        mx.compile(partial(_gated_own, activation)),
        _tolerance(dtype),
    )


def _rotary(kind: str, dtype: mx.Dtype, rest: Sequence[str]) -> Operation:
    interleaved = kind.endswith("_interleaved")
    return Operation(
        partial(_turned_inputs, dtype, int(rest[0])),
        partial(_turn_and_back, rotary.kernel, interleaved),
        partial(_wide_turns, interleaved),
        mx.compile(partial(_turn_and_back_own, interleaved)),
        _tolerance(dtype),
    )


def _attention(kind: str, dtype: mx.Dtype, rest: Sequence[str]) -> Operation:
    width = int(rest[0])
    scale = width**-0.5
    plain = partial(_attended_and_gradients, lambda q, k, v, *low: attention.reference(q, k, v, scale, *low)[0])
    return Operation(
        partial(_attention_inputs, dtype, width, kind.endswith("_bounded")),
        partial(_attended_and_gradients, attention.attention(scale)),
        partial(_wide_attention, plain),
        plain,  # MLX's way to the same bits every time; compiled it is as fast, and takes long to compile
        2**-6,
        is_compiled=False,
    )


def _embedding(_: str, dtype: mx.Dtype, __: Sequence[str]) -> Operation:
    return Operation(
        partial(_lookup_inputs, dtype),
        partial(_lookup_gradient, embedding.kernel_gradient),
        partial(_lookup_gradient, embedding.reference_gradient),
        partial(_lookup_gradient, ordered_gradient),  # compiled it is as fast, and takes 20 s of compilation
        _tolerance(dtype),
        is_compiled=False,
    )


def _cross_entropy(_: str, dtype: mx.Dtype, __: Sequence[str]) -> Operation:
    inputs = partial(_loss_inputs, dtype)
    return Operation(inputs, _loss_kernel, _loss_reference, mx.compile(_loss_own), _tolerance(dtype))


def _adamw(_: str, dtype: mx.Dtype, rest: Sequence[str]) -> Operation:
    rounded = TYPES[rest[0]]
    inputs = partial(_update_inputs, dtype, rounded)
    function, kernel = (partial(_update, one, rounded) for one in (adamw.reference, adamw.kernel))
    return Operation(inputs, kernel, function, mx.compile(function), _tolerance(dtype))


def _sum_of_squares(_: str, dtype: mx.Dtype, __: Sequence[str]) -> Operation:
    squares, kernel = (partial(_alone, one) for one in (adamw.reference_sum_of_squares, adamw.kernel_sum_of_squares))
    return Operation(partial(_normal, dtype, 1), kernel, squares, mx.compile(squares), _tolerance(mx.float32))


#: By what a kind begins with: takes the kind, the first type and the other parts of a name.
_MAKERS: dict[str, Callable[[str, mx.Dtype, Sequence[str]], Operation]] = {
    "rms_norm": _norm,
    "sum_rms_norm": _sum,
    "gated_": _gated,
    "mlp_": _gated,
    "rotary": _rotary,
    "attention": _attention,
    "embedding": _embedding,
    "cross_entropy": _cross_entropy,
    "adamw": _adamw,
    "sum_of_squares": _sum_of_squares,
}


def _random(shape: tuple[int, ...], seed: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _normal(dtype: mx.Dtype, count: int, size: int) -> Arrays:
    """Return matrices with large, tiny and zero rows."""
    width = 1024
    sizes = _row_scales(max(2, size // width))
    return [(_random((len(sizes), width), seed, mx.float32) * sizes).astype(dtype) for seed in range(count)]


def _row_scales(rows: int) -> mx.array:
    """Return (rows, 1): mostly 1, some rows tiny, some large, some zero."""
    return _in_turn([1.0, 1.0, 1e-3, 1.0, 30.0, 0.0, 1.0], rows)[:, None]


def _in_turn(values: list[float], count: int) -> mx.array:
    """Return some numbers over and over, (N,); without indexing, which MLX compiles on CUDA for seconds."""
    return mx.tile(mx.array(values), -(-count // len(values)))[:count]


def _wide(function: Callable[..., Arrays], *inputs: mx.array) -> Arrays:
    return function(*(array.astype(mx.float32) for array in inputs))


def _alone(function: Callable[..., mx.array], *inputs: mx.array) -> Arrays:
    return [function(*inputs)]


def _norm_inputs(dtype: mx.Dtype, width: int, size: int) -> Arrays:
    rows = min(max(3, size // width), 16_384)  # MLX's own way depends on how many: take what training does
    scales = _row_scales(rows)
    x = (_random((rows, width), 0, mx.float32) * scales * scales).astype(dtype)
    return [x, 1 + _random((width,), 1, dtype) * 0.2, _random((rows, width), 2, dtype)]


def _norm_kernel(x: mx.array, w: mx.array, g: mx.array) -> Arrays:
    return [rms_norm.kernel(x, w, _EPS), *rms_norm.kernel_gradients(x, w, _EPS, g)]


def _norm_reference(x: mx.array, w: mx.array, g: mx.array) -> Arrays:
    x, w, g = (array.astype(mx.float32) for array in (x, w, g))
    return [rms_norm.reference(x, w, _EPS), *rms_norm.reference_gradients(x, w, _EPS, g)]


def _sum_inputs(dtype: mx.Dtype, width: int, size: int) -> Arrays:
    x, w, g = _norm_inputs(dtype, width, size)
    r, e = (_random(x.shape, seed, dtype) * _row_scales(len(x)).astype(dtype) for seed in (3, 4))
    return [x, r, w, e, g]


def _sum_kernel(x: mx.array, r: mx.array, w: mx.array, e: mx.array, g: mx.array) -> Arrays:
    h, y = rms_norm.kernel_sum(x, r, w, _EPS)
    return [h, y, rms_norm.kernel(x, w, _EPS), *rms_norm.kernel_sum_gradients(x, w, _EPS, e, g)]


def _sum_reference(x: mx.array, r: mx.array, w: mx.array, e: mx.array, g: mx.array) -> Arrays:
    h = (x + r).astype(mx.float32)  # rounded: what follows is told apart from it
    x, w, e, g = (array.astype(mx.float32) for array in (x, w, e, g))
    norms = [rms_norm.reference(rows, w, _EPS) for rows in (h, x)]
    return [h, *norms, *rms_norm.reference_sum_gradients(x, w, _EPS, e, g)]


def _sum_own(x: mx.array, r: mx.array, w: mx.array, e: mx.array, g: mx.array) -> Arrays:
    """Return the same as MLX has it; what it adds is an operation of its own in a compiled step, too."""
    h = x + r
    norms = [mx.fast.rms_norm(rows, w, _EPS) for rows in (h, x)]
    _, (dx, dw) = mx.vjp(lambda x, w: mx.fast.rms_norm(x, w, _EPS), [x, w], [g])
    return [h, *norms, e + dx, dw]


def _norm_and_gradients(function: Callable[..., mx.array], x: mx.array, w: mx.array, g: mx.array) -> Arrays:
    values, gradients = mx.vjp(function, [x, w], [g])
    return [*values, *gradients]


def _joined_gradients(activation: str, a: mx.array, b: mx.array, g: mx.array) -> Arrays:
    return [*mx.split(gated_activation.kernel_joined(activation, a, b, g), 2, axis=-1)]


def _gated_own(activation: str, a: mx.array, b: mx.array, g: mx.array) -> Arrays:
    return mx.vjp(partial(gated_activation.reference, activation), [a, b], [g])[1]


#: Of the angles that the rotary embedding is proved with.
_BASE = 10_000.0


def _turned_inputs(dtype: mx.Dtype, width: int, size: int) -> Arrays:
    """Return queries as a projection made them, what comes in for them, and cosines and sines; heads are scaled."""
    heads = 9
    length = max(4, min(1024, size // (heads * width)))
    batch = max(1, size // (heads * width * length))
    scales = mx.array([1.0, 30.0, 1e-3, 1.0, 0.0, 1.0, 1.0, 1e3, 1.0])[:, None]
    x, g = (
        (_random((batch, length, heads, width), seed, mx.float32) * scales).astype(dtype).transpose(0, 2, 1, 3)
        for seed in (0, 1)
    )
    angles = np.arange(length)[:, None] * _BASE ** (-np.arange(width // 2) * 2 / width)
    return [x, g, *(mx.array(found.astype(np.float32)) for found in (np.cos(angles), np.sin(angles)))]


def _turn_and_back(
    function: Callable[..., mx.array], interleaved: bool, x: mx.array, g: mx.array, c: mx.array, s: mx.array
) -> Arrays:
    return [function(x, c, s, interleaved, False), function(g, c, s, interleaved, True)]


def _wide_turns(interleaved: bool, *inputs: mx.array) -> Arrays:
    return _wide(partial(_turn_and_back, rotary.reference, interleaved), *inputs)


def _turn_and_back_own(interleaved: bool, x: mx.array, g: mx.array, c: mx.array, s: mx.array) -> Arrays:
    turn = partial(mx.fast.rope, dims=x.shape[-1], traditional=interleaved, base=_BASE, scale=1.0, offset=0)
    values, gradients = mx.vjp(turn, [x], [g])
    return [*values, *gradients]


def _attention_inputs(dtype: mx.Dtype, width: int, is_bounded: bool, size: int) -> Arrays:
    """Return queries, keys, values, what comes in, and first keys; heads are scaled, and the last block is not full."""
    length = 333 if size > _AWKWARD else 77
    batch = max(1, size // (6 * length * width))
    scales = ([1.0, 2.0, 1e-3, 1.0, 0.0, 3.0], [1.0, 0.5], [1.0, 30.0], [1.0, 1e3, 1.0, 1e-3, 1.0, 1.0])
    arrays = []
    for seed, each in enumerate(scales):
        x = _random((batch, length, len(each), width), seed, mx.float32) * mx.array(each)[:, None]
        arrays.append(x.astype(dtype).transpose(0, 2, 1, 3))
    if is_bounded:  # by documents of 1 to 150 tokens, and in some rows by a window
        places = np.arange(length)[None]
        begins = np.array([0, 1, 2, 30, 63, 64, 70, 140, 180, 330])
        document = np.where(places[..., None] >= begins, begins, 0).max(axis=-1)
        is_window = np.arange(batch)[:, None] % 3 == 2
        arrays.append(mx.array(np.where(is_window, np.maximum(places - 40, 0), document).astype(np.int32)))
    return arrays


#: Numbers of awkward inputs, of which every value is looked at, and no time is taken.
_AWKWARD = 1 << 20


def _attended_and_gradients(function: Callable[..., mx.array], *inputs: mx.array) -> Arrays:
    """Return the result and the gradients, a row a head: where a query sees few keys its gradient cancels out."""
    q, k, v, g, *low = inputs
    values, gradients = mx.vjp(lambda q, k, v: function(q, k, v, *low), [q, k, v], [g])
    return [array.flatten(2) for array in (*values, *gradients)]


def _wide_attention(function: Callable[..., Arrays], *inputs: mx.array) -> Arrays:
    return [*_wide(lambda *wide: function(*wide, *inputs[4:]), *inputs[:4])]


def _lookup_inputs(dtype: mx.Dtype, size: int) -> Arrays:
    """Return numbers of a table, some of them many times, some never, and what comes in for them."""
    width = 576
    rows = max(8, size // width)
    numbers = np.random.default_rng(1).integers(0, _TABLE, rows, np.int32)
    numbers[::16] = 3
    numbers[:3] = 0, _TABLE - 1, _TABLE - 1
    return [mx.array(numbers), (_random((rows, width), 0, mx.float32) * _row_scales(rows)).astype(dtype)]


#: Rows of the table whose gradient is proved.
_TABLE = 32_768


def _lookup_gradient(
    function: Callable[[mx.array, mx.array, int], mx.array], numbers: mx.array, incoming: mx.array
) -> Arrays:
    return [function(numbers, incoming, _TABLE)]


def _loss_inputs(dtype: mx.Dtype, size: int) -> Arrays:
    width = 4096
    rows = max(4, size // width)
    logits = (_random((rows, width), 0, mx.float32) * (1 + _row_scales(rows))).astype(dtype)
    targets = np.random.default_rng(1).integers(0, width, rows, np.int32)
    targets[:2] = 0, width - 1
    weights = np.where(np.arange(rows) % 5 == 0, 0, 0.5).astype(np.float32)
    return [logits, mx.logsumexp(logits.astype(mx.float32), axis=-1), mx.array(targets), mx.array(weights)]


def _loss_kernel(z: mx.array, s: mx.array, t: mx.array, w: mx.array) -> Arrays:
    return [cross_entropy.kernel_gradient(z, s, t, w)]


def _loss_reference(z: mx.array, s: mx.array, t: mx.array, w: mx.array) -> Arrays:
    return [cross_entropy.reference_gradient(z.astype(mx.float32), s, t, w)]


def _loss_own(z: mx.array, s: mx.array, t: mx.array, w: mx.array) -> Arrays:
    probabilities = mx.softmax(z, axis=-1, precise=True)
    at_target = mx.arange(z.shape[-1], dtype=t.dtype) == t[:, None]
    return [(mx.where(at_target, probabilities - 1, probabilities) * w[:, None]).astype(z.dtype)]


def _update_inputs(weights: mx.Dtype, gradients: mx.Dtype, size: int) -> Arrays:
    size = size // 8 * 8 + 3  # the last eight are not whole
    moments = [_random((size,), seed, weights) * 1e-2 for seed in (2, 3)]
    gradient = _random((size,), 1, gradients) * _in_turn([1e-3, 1.0, 1e-6, 0.0, 1e3], size)
    scalars = [mx.array(0.01), mx.array(0.5), mx.array(True), mx.array(1.0), mx.array(1.5)]
    return [_random((size,), 0, weights), gradient.astype(gradients), moments[0], moments[1].square(), *scalars]


def _update(function: Callable[..., Arrays], rounded: mx.Dtype, *inputs: mx.array) -> Arrays:
    w, g, m, v, rate, scale, keep, first, root = inputs
    return function(w, g, m, v, adamw.Scalars(rate, scale, keep, first, root), _SETTINGS, rounded)
