import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlxflow.kernels import adamw, attention, cross_entropy, embedding, gated_activation, rms_norm, rotary
from mlxflow.kernels.verification import _deviation, verify
from mlxflow.kernels.verification_cases import case_of
from tests.kernels.stand_ins import uncompiled  # noqa: F401

# Of the norm a width for each number of threads that share a row, none a power of two but the largest
_REST = [
    ("rms_norm", "/72"),
    ("rms_norm", "/776"),
    ("rms_norm", "/2056"),
    ("rms_norm", "/8192"),
    ("sum_rms_norm", "/72"),
    ("sum_rms_norm", "/2056"),
    ("rotary", "/48"),
    ("rotary_interleaved", "/64"),
    ("embedding", ""),
    ("gated_silu", ""),
    ("gated_gelu", ""),
    ("gated_gelu_approx", ""),
    ("mlp_silu", ""),
    ("mlp_gelu", ""),
    ("mlp_gelu_approx", ""),
    ("cross_entropy", ""),
    ("adamw", "/float32"),
    ("adamw", "/bfloat16"),
    ("sum_of_squares", ""),
]
NAMES = [f"{kind}/{dtype}{rest}" for dtype in ("float32", "bfloat16") for kind, rest in _REST]
if not mx.metal.is_available():  # for which attention has no source
    NAMES += [f"attention{kind}/bfloat16/{width}" for kind in ("", "_bounded") for width in (64, 128)]
WIDTHS = [7, 8, 12, 576]
TYPES = [mx.float32, mx.bfloat16]
PLAIN = mx.float16  #: a type in which no kernel serves, whatever arrays come


def _random(shape: Sequence[int], seed: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _scaled(shape: tuple[int, ...], seed: int, dtype: mx.Dtype) -> mx.array:
    """Return numbers whose rows are, in turn, usual, tiny, large and zero."""
    scales = mx.array([1.0, 1e-4, 1e3, 0.0])[mx.arange(shape[0]) % 4]
    return (_random(shape, seed) * scales.reshape(-1, *[1] * (len(shape) - 1))).astype(dtype)


def _close(found: Sequence[mx.array], wanted: Sequence[mx.array], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert _deviation(one, other) <= tolerance


def _tolerance(dtype: mx.Dtype) -> float:
    return 2e-5 if dtype == mx.float32 else 2**-6


# --- the references are MLX's own operations, gradients included


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", [name for name in NAMES if "float32" in name])
def test_the_reference_is_what_mlx_computes(name: str) -> None:
    tried = case_of(name)
    inputs = tried.inputs(1 << 12)
    for ours, theirs in zip(tried.reference(*inputs), tried.mlx(*inputs), strict=True):
        assert _deviation(ours, theirs) < (2e-5 if name.count("bfloat16") == 0 else 2**-7)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_norm_and_its_gradients_are_those_of_mlx(width: int, dtype: mx.Dtype) -> None:
    x, w, g = _scaled((2, 8, width), 0, dtype), _random((width,), 1, dtype), _random((2, 8, width), 2, dtype)
    for function in (lambda x, w: rms_norm.reference(x, w, 1e-5), rms_norm.rms_norm(1e-5, PLAIN)):
        found = mx.vjp(function, [x, w], [g])
        wanted = mx.vjp(lambda x, w: mx.fast.rms_norm(x, w, 1e-5), [x, w], [g])
        for ours, theirs in zip(found, wanted, strict=True):
            _close(ours, theirs, _tolerance(dtype))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [16, 24])
def test_heads_are_turned_as_mlx_turns_them(width: int, interleaved: bool, dtype: mx.Dtype) -> None:
    x, g = _random((2, 3, 7, width), 0, dtype), _random((2, 3, 7, width), 1, dtype)
    layer = nn.RoPE(16, traditional=interleaved)
    known = layer(rotary.ones_and_zeros(16, 7, interleaved=interleaved))
    cosine, sine = (part[0, 0] for part in rotary.pairs(known, interleaved=interleaved))
    function = rotary.rotary(interleaved, PLAIN)
    found = mx.vjp(lambda x: function(x, cosine, sine), [x], [g])
    wanted = mx.vjp(layer, [x], [g])
    for ours, theirs in zip(found, wanted, strict=True):
        _close(ours, theirs, _tolerance(dtype))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", gated_activation.ACTIVATIONS)
def test_the_gradients_of_a_gated_activation_are_those_of_mlx(activation: str, dtype: mx.Dtype) -> None:
    a, b, g = (_scaled((8, 7), seed, dtype) for seed in range(3))
    found = mx.vjp(gated_activation.gated(activation, PLAIN), [a, b], [g])
    wanted = mx.vjp(lambda a, b: gated_activation.ACTIVATIONS[activation](a) * b, [a, b], [g])
    for ours, theirs in zip(found, wanted, strict=True):
        _close(ours, theirs, _tolerance(dtype) if dtype == mx.float32 else 2**-5)  # MLX rounds in between


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", TYPES)
def test_sums_and_norms_whose_input_goes_on_past_them_are_those_of_mlx(dtype: mx.Dtype) -> None:
    x, r, past, g = (_scaled((2, 4, 24), seed, dtype) for seed in range(4))
    weight = (1 + 0.3 * _random((24,), 5)).astype(dtype)

    def of_mlx(x: mx.array, r: mx.array, weight: mx.array) -> list[mx.array]:
        h = x + r
        return [h, mx.fast.rms_norm(h, weight, 1e-5)]

    found = mx.vjp(rms_norm.sum_and_norm(1e-5, PLAIN), [x, r, weight], [past, g])
    wanted = mx.vjp(of_mlx, [x, r, weight], [past, g])
    alone = mx.vjp(rms_norm.residual_and_norm(1e-5, PLAIN), [x + r, weight], [past, g])
    for ours, theirs, without in zip(found, wanted, alone, strict=True):
        _close(ours, theirs, _tolerance(dtype))
        _close(without, theirs if len(without) == len(theirs) else [theirs[0], theirs[2]], _tolerance(dtype))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("activation", gated_activation.ACTIVATIONS)
def test_the_gradients_of_two_projections_side_by_side_are_those_of_mlx(activation: str) -> None:
    x, g = _random((2, 3, 16), 0), _random((2, 3, 24), 1)
    weights = [_random((24, 16), seed) for seed in (2, 3)]
    found = mx.vjp(gated_activation.projected(activation, PLAIN), [x, *weights], [g])
    wanted = mx.vjp(lambda x, a, b: gated_activation.ACTIVATIONS[activation](x @ a.T) * (x @ b.T), [x, *weights], [g])
    for ours, theirs in zip(found, wanted, strict=True):
        _close(ours, theirs, _tolerance(mx.float32))


def _heads(
    batch: int, heads: int, shared_by: int, length: int, width: int, dtype: mx.Dtype = mx.float32
) -> list[mx.array]:
    """Return queries, keys, values and what comes in, as projections leave them."""
    each = (heads, heads // shared_by, heads // shared_by, heads)
    shapes = [(batch, length, count, width) for count in each]
    return [_random(shape, seed, dtype).transpose(0, 2, 1, 3) for seed, shape in enumerate(shapes)]


def _low(length: int, size: int) -> mx.array:
    """Return the first keys that queries see, (2, L): in one row by documents, in the other by a window."""
    places = mx.arange(length)
    return mx.stack([places // size * size, mx.maximum(places - size + 2, 0)]).astype(mx.int32)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize(("heads", "shared_by", "length"), [(2, 1, 1), (3, 1, 9), (6, 3, 17)])
def test_attention_and_its_gradients_are_those_of_mlx(
    heads: int, shared_by: int, length: int, is_bounded: bool
) -> None:
    q, k, v, g = _heads(2, heads, shared_by, length, 8)
    low, places = _low(length, 5) if is_bounded else None, mx.arange(length)
    sees = (places[:, None] >= places) & (places >= _low(length, 5)[:, None, :, None])

    def of_mlx(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=sees if is_bounded else "causal")

    out, lse = attention.reference(q, k, v, 0.3, low)
    values, gradients = mx.vjp(of_mlx, [q, k, v], [g])
    found = [out, *attention.reference_gradients(q, k, v, 0.3, out, lse, g, low)]
    for one, other in zip(found, [*values, *gradients], strict=True):
        assert float(mx.abs(one - other).max()) < 2e-5 * max(1.0, float(mx.abs(other).max()))


@pytest.mark.parametrize(
    ("q", "k", "v", "scale", "is_taken"),
    [
        ((2, 6, 40, 64), (2, 2, 40, 64), (2, 2, 40, 64), 0.1, True),
        ((2, 6, 40, 16), (2, 6, 40, 16), (2, 6, 40, 16), 0.1, True),
        ((2, 6, 40, 24), (2, 6, 40, 24), (2, 6, 40, 24), 0.1, False),
        ((2, 6, 40, 144), (2, 6, 40, 144), (2, 6, 40, 144), 0.1, False),
        ((2, 6, 40, 64), (2, 4, 40, 64), (2, 4, 40, 64), 0.1, False),
        ((2, 6, 40, 64), (2, 2, 80, 64), (2, 2, 80, 64), 0.1, False),
        ((2, 6, 40, 64), (2, 2, 40, 64), (2, 2, 40, 32), 0.1, False),
        ((2, 6, 40, 64), (2, 2, 40, 64), (2, 2, 40, 64), 0.0, False),
    ],
)
def test_what_attention_takes(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], scale: float, is_taken: bool
) -> None:
    queries, keys, values = (mx.zeros(shape, mx.bfloat16) for shape in (q, k, v))
    assert attention.supports(queries, keys, values, scale) == is_taken
    assert not attention.supports(queries.astype(mx.float16), keys, values, scale)


@pytest.mark.usefixtures("uncompiled")
def test_the_gradient_of_the_loss_is_that_of_mlx() -> None:
    logits, targets = _random((9, 13), 0) * 20, mx.array([0, 12, 5, 3, 3, 1, 7, 8, 11])
    weights = mx.array([1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 0.25, 1.0, 3.0])

    def loss(z: mx.array) -> mx.array:
        total: mx.array = (nn.losses.cross_entropy(z, targets) * weights).sum()
        return total

    found = cross_entropy.reference_gradient(logits, mx.logsumexp(logits, axis=-1), targets, weights)
    assert mx.allclose(found, mx.grad(loss)(logits), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("corrects", [True, False])
def test_the_update_is_that_of_mlx(corrects: bool) -> None:
    rate, settings = 0.01, adamw.AdamWSettings(0.9, 0.95, 1e-8, 0.1)
    optimizer = optim.AdamW(rate, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, bias_correction=corrects)
    theirs = {"w": _random((37,), 0)}
    optimizer.init(theirs)
    w, m, v = theirs["w"], mx.zeros(37), mx.zeros(37)
    for step in range(1, 6):
        gradient = _random((37,), step) * 10.0 ** (step - 3)
        theirs = optimizer.apply_gradients({"w": gradient}, theirs)
        first, root = (1 / (1 - 0.9**step), 1 / math.sqrt(1 - 0.95**step)) if corrects else (1.0, 1.0)
        scalars = adamw.Scalars(*(mx.array(one) for one in (rate, 0.5, True, first, root)))
        w, m, v, _ = adamw.reference(w, 2 * gradient, m, v, scalars, settings, mx.float32)
    assert mx.allclose(w, theirs["w"], rtol=1e-5, atol=1e-7)
    kept = adamw.reference(w, w, m, v, scalars._replace(keep=mx.array(False)), settings, mx.bfloat16)
    assert all(mx.array_equal(new, old) for new, old in zip(kept[:3], (w, m, v), strict=True))
    assert mx.array_equal(kept[3], w.astype(mx.bfloat16))


def test_the_sum_of_squares_is_that_of_the_numbers() -> None:
    x = mx.array([3.0, -4.0, 12.0], mx.bfloat16)
    assert float(adamw.reference_sum_of_squares(x)) == 169


@pytest.mark.parametrize(
    ("x", "is_taken"),
    [
        (mx.zeros((3, 8)), True),
        (mx.zeros((3, 8), mx.bfloat16), True),
        (mx.zeros((3, 8), mx.float16), False),
        (mx.zeros((3, 12)), False),
        (mx.zeros((3, 8200)), False),
        (mx.zeros(8), False),
    ],
)
def test_what_the_norm_does_not_take_goes_to_the_reference(x: mx.array, is_taken: bool) -> None:
    assert rms_norm.supports(x) == is_taken


# --- the kernels are their references: needs a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_what_the_reference_computes(name: str) -> None:
    outcome = verify(case_of(name))
    assert 0 <= outcome.error <= case_of(name).tolerance, outcome
    mx.clear_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_two_runs_of_a_kernel_are_equal_to_the_bit(name: str) -> None:
    tried = case_of(name)
    inputs = tried.inputs(1 << 20)
    first = tried.kernel(*inputs)
    mx.eval(first)
    for _ in range(5):
        again = tried.kernel(*inputs)
        assert all(mx.array_equal(one, other, equal_nan=True) for one, other in zip(first, again, strict=True))


def _functions(dtype: mx.Dtype, width: int) -> dict[str, tuple[Callable[..., mx.array], Callable[..., mx.array]]]:
    """Return each differentiable function of rows as the kernel serves it, and in plain operations."""
    weight = 1 + _random((width,), 9, dtype) * 0.2
    found: dict[str, tuple[Callable[..., mx.array], Callable[..., mx.array]]] = {
        activation: (gated_activation.gated(activation, dtype), gated_activation.gated(activation, PLAIN))
        for activation in gated_activation.ACTIVATIONS
    }
    norm, plain = rms_norm.rms_norm(1e-5, dtype), rms_norm.rms_norm(1e-5, PLAIN)
    found["norm"] = (lambda a, b: norm(a, weight) + b, lambda a, b: plain(a, weight) + b)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["plain", "compiled", "checkpointed", "compiled and checkpointed"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [72, 12])  # one that the kernels take and one that they may leave to the reference
def test_gradients_are_the_references_compiled_and_checkpointed_too(width: int, dtype: mx.Dtype, way: str) -> None:
    a, b, g = (_scaled((2, 6, width), seed, dtype) for seed in range(3))
    for name, (ours, plain) in _functions(dtype, width).items():
        inner = mx.checkpoint(ours) if "checkpointed" in way else ours

        def gradients(a: mx.array, b: mx.array, g: mx.array, inner: Callable[..., mx.array] = inner) -> list[mx.array]:
            return mx.vjp(inner, [a, b], [g])[1]

        found = (mx.compile(gradients) if "compiled" in way else gradients)(a, b, g)
        wanted = mx.vjp(plain, [a, b], [g])[1]
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == dtype
            assert _deviation(one, other) <= 2 * _tolerance(dtype), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_views_that_begin_anywhere_and_transposed_arrays_are_taken(dtype: mx.Dtype) -> None:
    whole = _random((3 * 41 * 72 + 5,), 0, dtype)
    begin = whole[5:].reshape(3, 41, 72)
    for x in (begin, begin[:, 1:], begin[:, ::2], _random((72, 41), 1, dtype).T, begin[:, :, 1:65]):
        g = mx.ones_like(x) * 0.5
        for name, (ours, plain) in _functions(dtype, x.shape[-1]).items():
            found, wanted = mx.vjp(ours, [x, g], [g]), mx.vjp(plain, [x, g], [g])
            for one, other in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
                assert _deviation(one, other) <= 2 * _tolerance(dtype), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [8, 72, 2040, 2048, 4104])
def test_looked_up_rows_are_summed_whatever_their_width(width: int, dtype: mx.Dtype) -> None:
    often = mx.where(mx.arange(700) % 3 == 0, 5, mx.random.randint(0, 40, (700,), key=mx.random.key(0)))
    for numbers in (often, mx.array([0, 40, 40]), mx.zeros((17,), mx.int32), mx.arange(16) // 16):
        incoming = _random((len(numbers), width), 1, dtype)
        found, wanted = (
            function(numbers, incoming, 41) for function in (embedding.kernel_gradient, embedding.reference_gradient)
        )
        _close([found], [wanted], _tolerance(dtype))
        assert mx.array_equal(found, embedding.kernel_gradient(numbers, incoming, 41))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "turned"), [(16, 16), (64, 64), (80, 32), (96, 16), (256, 256)])
def test_heads_of_any_width_are_turned_wholly_or_in_part(
    width: int, turned: int, interleaved: bool, dtype: mx.Dtype
) -> None:
    angles = mx.arange(7)[:, None] * mx.power(10.0, -mx.arange(turned // 2) / turned)
    function = rotary.rotary(interleaved, dtype)
    for x in (_random((2, 7, 3, width), 0, dtype).transpose(0, 2, 1, 3), _random((2, 3, 7, width), 1, dtype)):
        found = mx.vjp(lambda x: function(x, mx.cos(angles), mx.sin(angles)), [x], [x * 2])
        there = rotary.reference(x, mx.cos(angles), mx.sin(angles), interleaved, False)
        back = rotary.reference(x * 2, mx.cos(angles), mx.sin(angles), interleaved, True)
        _close([found[0][0], found[1][0]], [there, back], _tolerance(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8, 9, 15, 16, 4097, 100_003])
@pytest.mark.parametrize("types", [(mx.float32, mx.float32), (mx.float32, mx.bfloat16), (mx.bfloat16, mx.bfloat16)])
@pytest.mark.parametrize("keeps", [True, False])
def test_the_update_takes_any_length_and_keeps_what_is_not_finite(
    size: int, types: tuple[mx.Dtype, mx.Dtype], keeps: bool
) -> None:
    weights, gradients = types
    w, m, v = (_random((size,), seed, weights) for seed in (0, 1, 2))
    g = _random((size,), 3, gradients)
    scalars = adamw.Scalars(*(mx.array(one) for one in (0.01, 0.5, keeps, 1.5, 1.2)))
    arguments = (w, g, m, v.square(), scalars, adamw.AdamWSettings(0.9, 0.95, 1e-8, 0.1), mx.bfloat16)
    for one, other in zip(adamw.kernel(*arguments), adamw.reference(*arguments), strict=True):
        assert one.dtype == other.dtype
        limit = 1e-5 if one.dtype == mx.float32 else 2**-7
        assert _deviation(one, other) <= limit


_ON_CUDA = pytest.mark.skipif(mx.metal.is_available(), reason="attention has no source for Metal")


@pytest.mark.gpu
@_ON_CUDA
@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize("width", [16, 48, 64, 80, 128])
@pytest.mark.parametrize(
    ("heads", "shared_by", "length"), [(1, 1, 1), (6, 3, 63), (4, 1, 64), (8, 4, 129), (9, 3, 700)]
)
def test_attention_of_any_length_and_its_gradients_are_the_references(
    heads: int, shared_by: int, length: int, width: int, is_bounded: bool
) -> None:
    *primals, g = _heads(2, heads, shared_by, length, width, mx.bfloat16)
    low = [_low(length, 90)] if is_bounded else []  # of which some see nothing of a block's first keys
    scale = width**-0.5
    found = mx.vjp(lambda q, k, v: attention.attention(scale)(q, k, v, *low), primals, [g])
    wide = [array.astype(mx.float32) for array in primals]
    wanted = mx.vjp(lambda q, k, v: attention.reference(q, k, v, scale, *low)[0], wide, [g.astype(mx.float32)])
    for one, other in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
        assert one.dtype == mx.bfloat16
        flat = [array.astype(mx.float32).flatten(2) for array in (one, other)]  # a query alone has no gradient
        assert float(mx.abs(flat[0] - flat[1]).max()) <= 2**-6 * max(1.0, float(mx.abs(flat[1]).max()))


@pytest.mark.gpu
@_ON_CUDA
@pytest.mark.parametrize("way", ["compiled", "checkpointed", "begins anywhere", "rows of heads"])
def test_attention_takes_arrays_as_they_come(way: str) -> None:
    *primals, g = _heads(2, 6, 3, 200, 64, mx.bfloat16)
    ours = attention.attention(0.1)
    wanted = mx.vjp(ours, primals, [g])
    if way == "checkpointed":
        found = mx.vjp(mx.checkpoint(ours), primals, [g])
    elif way == "compiled":
        compiled = mx.compile(lambda *inputs: mx.vjp(ours, [*inputs[:3]], [*inputs[3:]]))
        found = compiled(*primals, g)
    else:
        *primals, g = (_moved(array) if way == "begins anywhere" else mx.contiguous(array) for array in (*primals, g))
        found = mx.vjp(ours, primals, [g])
    for one, other in zip([*found[0], *found[1]], [*wanted[0], *wanted[1]], strict=True):
        assert mx.array_equal(one, other)


def _moved(array: mx.array) -> mx.array:
    """Return an array whose first number is the sixth of a buffer."""
    rows = array.transpose(0, 2, 1, 3)
    whole = mx.concatenate([mx.zeros((5,), array.dtype), rows.flatten()])
    mx.eval(whole)
    return whole[5:].reshape(rows.shape).transpose(0, 2, 1, 3)
