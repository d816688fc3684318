"""The verification case of each kernel: its inputs, reference, and MLX's implementation to compare the speed with."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlxflow.kernels import (
    adamw,
    attention,
    cross_entropy,
    embedding,
    gated_activation,
    quantized_product,
    rms_norm,
    rotary,
    verification_inputs,
)
from mlxflow.kernels.kernel_names import TYPES
from mlxflow.kernels.verification_inputs import Arrays
from mlxflow.ops.embedding_lookup import ordered_gradient

_EPS = 1e-5
_NORM_ROUNDS = 4
_SETTINGS = adamw.AdamWSettings(b1=0.9, b2=0.95, eps=1e-8, decay=0.1)


class Case(NamedTuple):
    """One kernel in one dtype and width.

    Attributes:
        inputs: takes a number of elements; returns inputs of about that size, see `verification_inputs`.
        kernel: the function to verify.
        reference: the same in plain operations and fp32.
        mlx: MLX's implementation, which the kernel must be faster than.
        tolerance: of a result, relative to the largest value in its row.
        is_compiled: whether the kernel is timed inside `mx.compile`, as MLX's implementation is.
        more_inputs: further inputs that are compared and not timed, with which each loop whose rounds depend on a shape
            takes at least two: what a round leaves behind may spoil the next.
    """

    inputs: Callable[[int], Arrays]
    kernel: Callable[..., Arrays]
    reference: Callable[..., Arrays]
    mlx: Callable[..., Arrays]
    tolerance: float
    is_compiled: bool = True
    more_inputs: tuple[Callable[[], Arrays], ...] = ()

    def checked_inputs(self, size: int) -> list[Arrays]:
        """Return all inputs with which the kernel is compared with its reference.

        Args:
            size: number of elements of the first ones.
        """
        return [self.inputs(size), *(make() for make in self.more_inputs)]


def case_of(name: str) -> Case:
    """Return the case of a kernel name.

    Raises:
        KeyError: there is none.
    """
    kind, *parts = name.split("/")
    makers = [make for prefix, make in _MAKERS.items() if kind.startswith(prefix)]
    if not makers:
        raise KeyError(name)
    return makers[0](kind, TYPES[parts[0]], parts[1:])


def _tolerance(dtype: mx.Dtype) -> float:
    return 2e-5 if dtype == mx.float32 else 2**-7


def _norm(kind: str, dtype: mx.Dtype, rest: Sequence[str]) -> Case:
    plain = partial(_norm_and_gradients, lambda x, w: mx.fast.rms_norm(x, w, _EPS))
    inputs = partial(verification_inputs.norm, dtype, int(rest[0]))
    more = (partial(inputs, _norm_size(int(rest[0]))),)
    if kind.endswith("_frozen"):
        reference, mlx = partial(_without_last, _norm_reference), mx.compile(partial(_without_last, plain))
        return Case(inputs, _frozen_norm_kernel, reference, mlx, _tolerance(dtype), more_inputs=more)
    return Case(inputs, _norm_kernel, _norm_reference, mx.compile(plain), _tolerance(dtype), more_inputs=more)


def _norm_size(width: int) -> int:
    """Return the size of rows that take every group of the backward pass several rounds, and some groups one more."""
    return (_NORM_ROUNDS * rms_norm.rows_at_once(width) + 3) * width


def _sum(kind: str, dtype: mx.Dtype, rest: Sequence[str]) -> Case:
    inputs = partial(verification_inputs.residual_norm, dtype, int(rest[0]))
    more = (partial(inputs, _norm_size(int(rest[0]))),)
    if kind.endswith("_frozen"):
        reference, mlx = partial(_without_last, _sum_reference), mx.compile(partial(_without_last, _sum_mlx))
        return Case(inputs, _frozen_sum_kernel, reference, mlx, _tolerance(dtype), more_inputs=more)
    return Case(inputs, _sum_kernel, _sum_reference, _sum_mlx, _tolerance(dtype), more_inputs=more)


def _gated(kind: str, dtype: mx.Dtype, _: Sequence[str]) -> Case:
    form, _, activation = kind.partition("_")
    gated_activation.ACTIVATIONS[activation]
    return Case(
        partial(verification_inputs.normal, dtype, 3),
        partial(gated_activation.kernel_gradients if form == "gated" else _joined_gradients, activation),
        partial(_wide, partial(gated_activation.reference_gradients, activation)),
        mx.compile(partial(_gated_mlx, activation)),
        _tolerance(dtype),
    )


def _rotary(kind: str, dtype: mx.Dtype, rest: Sequence[str]) -> Case:
    interleaved = kind.endswith("_interleaved")
    width = int(rest[0])
    partly = partial(verification_inputs.rotary, dtype, width, 9 * 4 * 2 * width, head_width=2 * width)
    return Case(
        partial(verification_inputs.rotary, dtype, width),
        partial(_turn_and_back, rotary.kernel, interleaved),
        partial(_wide_turns, interleaved),
        mx.compile(partial(_turn_and_back_mlx, interleaved)),
        _tolerance(dtype),
        more_inputs=(partly,),
    )


def _attention(kind: str, dtype: mx.Dtype, rest: Sequence[str]) -> Case:
    width = int(rest[0])
    scale = width**-0.5
    inputs = partial(verification_inputs.attention, dtype, width, kind.endswith("_bounded"))
    longer = (partial(inputs, 3 * 6 * 333 * width, length=333), partial(inputs, 6 * 2190 * width, length=2190))
    plain = partial(_attended_and_gradients, lambda q, k, v, *low: attention.reference(q, k, v, scale, *low)[0])
    return Case(
        inputs,
        partial(_attended_and_gradients, attention.attention(scale)),
        partial(_wide_attention, plain),
        plain,  # MLX's deterministic attention; compiled it is no faster, and takes long to compile
        2**-6,
        is_compiled=False,
        more_inputs=longer,
    )


def _embedding(_: str, dtype: mx.Dtype, __: Sequence[str]) -> Case:
    return Case(
        partial(verification_inputs.embedding, dtype),
        partial(_lookup_gradient, embedding.kernel_gradient),
        partial(_lookup_gradient, embedding.reference_gradient),
        partial(_lookup_gradient, ordered_gradient),  # compiled it is no faster, and takes 20 s to compile
        _tolerance(dtype),
        is_compiled=False,
        more_inputs=(partial(verification_inputs.embedding, dtype, 64 * 2312, width=2312),),
    )


def _cross_entropy(_: str, dtype: mx.Dtype, __: Sequence[str]) -> Case:
    inputs = partial(verification_inputs.cross_entropy, dtype)
    more = (partial(inputs, 7 * 6152, width=6152),)
    return Case(inputs, _loss_kernel, _loss_reference, mx.compile(_loss_mlx), _tolerance(dtype), more_inputs=more)


def _adamw(_: str, dtype: mx.Dtype, rest: Sequence[str]) -> Case:
    rounded = TYPES[rest[0]]
    inputs = partial(verification_inputs.adamw, dtype, rounded)
    function, kernel = (partial(_update, update, rounded) for update in (adamw.reference, adamw.kernel))
    return Case(inputs, kernel, function, mx.compile(function), _tolerance(dtype))


def _sum_of_squares(_: str, dtype: mx.Dtype, __: Sequence[str]) -> Case:
    squares, kernel = (
        partial(_as_list, sums) for sums in (adamw.reference_sum_of_squares, adamw.kernel_sum_of_squares)
    )
    sizes = 5 * adamw.squares_at_once() // 2 + 5, 13  # of a few numbers, the last ones are a large part of the sum
    more = tuple(partial(verification_inputs.flat, dtype, size) for size in sizes)
    inputs = partial(verification_inputs.normal, dtype, 1)
    return Case(inputs, kernel, squares, mx.compile(squares), _tolerance(mx.float32), more_inputs=more)


def _quantized_product(_: str, dtype: mx.Dtype, rest: Sequence[str]) -> Case:
    shape = quantized_product.ProductShape.of(dtype, rest)
    return Case(
        partial(quantized_product.inputs, shape),
        partial(quantized_product.kernel, shape),
        partial(quantized_product.reference, shape),
        mx.compile(partial(quantized_product.mlx, shape)),
        _tolerance(dtype),
        more_inputs=(partial(quantized_product.inputs, shape, more_rows=37),),  # the last rows fill no block
    )


#: By the prefix of the kind: takes the kind, the first dtype and the other parts of a name.
_MAKERS: dict[str, Callable[[str, mx.Dtype, Sequence[str]], Case]] = {
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
    quantized_product.KIND: _quantized_product,
}


def _wide(function: Callable[..., Arrays], *inputs: mx.array) -> Arrays:
    return function(*(array.astype(mx.float32) for array in inputs))


def _as_list(function: Callable[..., mx.array], *inputs: mx.array) -> Arrays:
    return [function(*inputs)]


def _norm_kernel(x: mx.array, w: mx.array, g: mx.array) -> Arrays:
    return [rms_norm.kernel(x, w, _EPS), *rms_norm.kernel_gradients(x, w, _EPS, g)]


def _frozen_norm_kernel(x: mx.array, w: mx.array, g: mx.array) -> Arrays:
    return [rms_norm.kernel(x, w, _EPS), rms_norm.kernel_frozen_gradient(x, w, _EPS, g)]


def _without_last(function: Callable[..., Arrays], *inputs: mx.array) -> Arrays:
    """Return the results of a function but the last, the gradient of a weight that is frozen here."""
    return function(*inputs)[:-1]


def _norm_reference(x: mx.array, w: mx.array, g: mx.array) -> Arrays:
    x, w, g = (array.astype(mx.float32) for array in (x, w, g))
    return [rms_norm.reference(x, w, _EPS), *rms_norm.reference_gradients(x, w, _EPS, g)]


def _sum_kernel(x: mx.array, r: mx.array, w: mx.array, e: mx.array, g: mx.array) -> Arrays:
    h, y = rms_norm.kernel_sum(x, r, w, _EPS)
    return [h, y, rms_norm.kernel(x, w, _EPS), *rms_norm.kernel_sum_gradients(x, w, _EPS, e, g)]


def _frozen_sum_kernel(x: mx.array, r: mx.array, w: mx.array, e: mx.array, g: mx.array) -> Arrays:
    h, y = rms_norm.kernel_sum(x, r, w, _EPS)
    return [h, y, rms_norm.kernel(x, w, _EPS), rms_norm.kernel_sum_frozen_gradient(x, w, _EPS, e, g)]


def _sum_reference(x: mx.array, r: mx.array, w: mx.array, e: mx.array, g: mx.array) -> Arrays:
    h = (x + r).astype(mx.float32)  # rounded, as the kernel rounds it before the norm
    x, w, e, g = (array.astype(mx.float32) for array in (x, w, e, g))
    norms = [rms_norm.reference(rows, w, _EPS) for rows in (h, x)]
    return [h, *norms, *rms_norm.reference_sum_gradients(x, w, _EPS, e, g)]


def _sum_mlx(x: mx.array, r: mx.array, w: mx.array, e: mx.array, g: mx.array) -> Arrays:
    """Return the same by MLX; in a compiled step, too, its sum is a separate operation."""
    h = x + r
    norms = [mx.fast.rms_norm(rows, w, _EPS) for rows in (h, x)]
    _, (dx, dw) = mx.vjp(lambda x, w: mx.fast.rms_norm(x, w, _EPS), [x, w], [g])
    return [h, *norms, e + dx, dw]


def _norm_and_gradients(function: Callable[..., mx.array], x: mx.array, w: mx.array, g: mx.array) -> Arrays:
    values, gradients = mx.vjp(function, [x, w], [g])
    return [*values, *gradients]


def _joined_gradients(activation: str, a: mx.array, b: mx.array, g: mx.array) -> Arrays:
    return [*mx.split(gated_activation.kernel_joined(activation, a, b, g), 2, axis=-1)]


def _gated_mlx(activation: str, a: mx.array, b: mx.array, g: mx.array) -> Arrays:
    return mx.vjp(partial(gated_activation.reference, activation), [a, b], [g])[1]


def _turn_and_back(
    function: Callable[..., mx.array], interleaved: bool, x: mx.array, g: mx.array, c: mx.array, s: mx.array
) -> Arrays:
    return [function(x, c, s, interleaved, False), function(g, c, s, interleaved, True)]


def _wide_turns(interleaved: bool, *inputs: mx.array) -> Arrays:
    return _wide(partial(_turn_and_back, rotary.reference, interleaved), *inputs)


def _turn_and_back_mlx(interleaved: bool, x: mx.array, g: mx.array, c: mx.array, s: mx.array) -> Arrays:
    turn = partial(
        mx.fast.rope,
        dims=x.shape[-1],
        traditional=interleaved,
        base=verification_inputs.ROTARY_BASE,
        scale=1.0,
        offset=0,
    )
    values, gradients = mx.vjp(turn, [x], [g])
    return [*values, *gradients]


def _attended_and_gradients(function: Callable[..., mx.array], *inputs: mx.array) -> Arrays:
    """Return the result and the gradients, a row for each head: with few keys a query's gradient cancels to zero."""
    q, k, v, g, *low = inputs
    values, gradients = mx.vjp(lambda q, k, v: function(q, k, v, *low), [q, k, v], [g])
    return [array.flatten(2) for array in (*values, *gradients)]


def _wide_attention(function: Callable[..., Arrays], *inputs: mx.array) -> Arrays:
    return [*_wide(lambda *wide: function(*wide, *inputs[4:]), *inputs[:4])]


def _lookup_gradient(
    function: Callable[[mx.array, mx.array, int], mx.array], numbers: mx.array, incoming: mx.array
) -> Arrays:
    return [function(numbers, incoming, verification_inputs.table_rows(incoming.shape[1]))]


def _loss_kernel(z: mx.array, s: mx.array, t: mx.array, w: mx.array) -> Arrays:
    return [cross_entropy.kernel_gradient(z, s, t, w)]


def _loss_reference(z: mx.array, s: mx.array, t: mx.array, w: mx.array) -> Arrays:
    return [cross_entropy.reference_gradient(z.astype(mx.float32), s, t, w)]


def _loss_mlx(z: mx.array, s: mx.array, t: mx.array, w: mx.array) -> Arrays:
    probabilities = mx.softmax(z, axis=-1, precise=True)
    at_target = mx.arange(z.shape[-1], dtype=t.dtype) == t[:, None]
    return [(mx.where(at_target, probabilities - 1, probabilities) * w[:, None]).astype(z.dtype)]


def _update(function: Callable[..., Arrays], rounded: mx.Dtype, *inputs: mx.array) -> Arrays:
    w, g, m, v, rate, scale, keep, first, root = inputs
    return function(w, g, m, v, adamw.Scalars(rate, scale, keep, first, root), _SETTINGS, rounded)
