from collections.abc import Callable, Sequence

import mlx.core as mx
import pytest

from mlxflow.kernels import adamw, attention, gated_activation, rms_norm, rotary
from mlxflow.kernels.codegen import KernelSource
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
    ("rms_norm_frozen", "/776"),
    ("rms_norm_frozen", "/2056"),
    ("sum_rms_norm_frozen", "/72"),
    ("sum_rms_norm_frozen", "/2056"),
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
TYPES = [mx.float32, mx.bfloat16]
_ON_CUDA = pytest.mark.skipif(mx.metal.is_available(), reason="attention has no source for Metal")
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
def test_references_match_mlx(name: str) -> None:
    tried = case_of(name)
    inputs = tried.inputs(1 << 12)
    for ours, theirs in zip(tried.reference(*inputs), tried.mlx(*inputs), strict=True):
        assert _deviation(ours, theirs) < (2e-5 if name.count("bfloat16") == 0 else 2**-7)


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


# --- the kernels are their references: needs a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_kernels_match_their_references(name: str) -> None:
    outcome = verify(case_of(name))
    assert 0 <= outcome.error <= case_of(name).tolerance, outcome
    mx.clear_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_two_runs_of_a_kernel_are_equal_to_the_bit(name: str, request: pytest.FixtureRequest) -> None:
    tried = case_of(name)
    inputs = tried.inputs(1 << (16 if request.config.getoption("--metal") else 20))
    first = tried.kernel(*inputs)
    mx.eval(first)
    for _ in range(5):
        again = tried.kernel(*inputs)
        assert all(mx.array_equal(one, other, equal_nan=True) for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [
        "rms_norm/float32/2056",
        "sum_rms_norm/bfloat16/2056",
        "rms_norm/bfloat16/1536",
        "rms_norm_frozen/float32/2056",
        "sum_rms_norm_frozen/bfloat16/2056",
    ],
)
def test_the_backward_norm_without_its_barrier_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the barrier before the next row's sums is tested by the stand-in for Metal: on an H200 no thread overtook another
    barrier = "      BARRIER;\n      squares = products"
    for source in ("BACKWARD", "SUM_BACKWARD", "FROZEN_BACKWARD", "SUM_FROZEN_BACKWARD"):
        kernel: KernelSource = getattr(rms_norm, source)
        assert kernel.body.count(barrier) == 1
        without = kernel.body.replace(barrier, "      squares = products")
        monkeypatch.setattr(rms_norm, source, kernel._replace(name=f"{kernel.name}_mutant", body=without))
    result = verify(case_of(name))
    assert not result.passed
    assert result.reason.startswith("it deviates by ")
    mx.clear_cache()


# Loops over the blocks of attention: the source, what advances the loop, and what ends it after its first round
_BLOCK_LOOPS = [
    ("FORWARD", "++tile", "tile = 1 << 30"),
    ("BACKWARD_QUERIES", "++tile", "tile = 1 << 30"),
    ("BACKWARD_QUERIES", "part += PART", "part = KEYS"),
    ("BACKWARD_KEYS", "++tile", "tile = 1 << 30"),
    ("BACKWARD_KEYS", "part += PART", "part = QUERIES"),
    ("BACKWARD_KEYS", "i += 32", "i = 1 << 30"),
]


@pytest.mark.gpu
@_ON_CUDA
@pytest.mark.parametrize(("source", "step", "end"), _BLOCK_LOOPS)
def test_an_attention_loop_that_ends_after_its_first_round_is_refused(
    source: str, step: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: tuple[KernelSource, KernelSource] = getattr(attention, source)
    assert all(kernel.body.count(f"; {step})") == 1 for kernel in kernels)
    mutants = tuple(
        kernel._replace(name=f"{kernel.name}_mutant", body=kernel.body.replace(f"; {step})", f"; {end})"))
        for kernel in kernels
    )
    monkeypatch.setattr(attention, source, mutants)
    result = verify(case_of("attention_bounded/bfloat16/64"))
    assert not result.passed
    assert result.reason.startswith("it deviates by ")
    mx.clear_cache()


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
def test_compiled_and_checkpointed_gradients_match_the_references(width: int, dtype: mx.Dtype, way: str) -> None:
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
def test_offset_views_and_transposed_arrays_are_accepted(dtype: mx.Dtype) -> None:
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
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "turned"), [(16, 16), (64, 64), (80, 32), (96, 16), (256, 256)])
def test_rotary_accepts_heads_of_any_width_rotated_fully_or_partly(
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
def test_the_adamw_kernel_accepts_any_length_and_propagates_non_finite_values(
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


@pytest.mark.gpu
@_ON_CUDA
@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize("width", [16, 48, 64, 80, 128])
@pytest.mark.parametrize(
    ("heads", "shared_by", "length"), [(1, 1, 1), (6, 3, 63), (4, 1, 64), (8, 4, 129), (9, 3, 700)]
)
def test_attention_and_gradients_of_any_length_match_the_reference(
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
def test_attention_accepts_any_memory_layout(way: str) -> None:
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
