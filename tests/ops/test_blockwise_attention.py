"""Causal attention by blocks of queries on the CPU, against all scores in fp32."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from mlxflow.ops import blockwise_attention
from mlxflow.ops.blockwise_attention import causal_attention

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="serves on the CPU only")

SCALE = 0.4


def _inputs(heads: int, grouped: int, length: int, width: int = 8) -> list[mx.array]:
    """Return queries, keys, values and the incoming gradient."""
    keys = mx.random.split(mx.random.key(length), 4)
    counts = (heads, grouped, grouped, heads)
    return [mx.random.normal((2, n, length, width), key=key) for n, key in zip(counts, keys, strict=True)]


def _first(length: int) -> mx.array:
    """Return the first keys of two rows: of documents in the first one, of a window in the other one."""
    places = np.arange(length)
    documents = np.where(places >= length // 3, length // 3, 0)
    return mx.array(np.stack([documents, np.maximum(places - 5, 0)]).astype(np.int32))


class _Exact(NamedTuple):
    """Results and gradients in float64, and the size of the terms that each number adds up."""

    values: "list[NDArray[np.float64]]"
    sizes: "list[NDArray[np.float64]]"


def _exact(inputs: list[mx.array], first: mx.array | None) -> _Exact:
    queries, keys, values, incoming = (np.array(one.astype(mx.float32), np.float64) for one in inputs)
    shared = queries.shape[1] // keys.shape[1]
    wide_keys, wide_values = (np.repeat(one, shared, axis=1) for one in (keys, values))
    places = np.arange(queries.shape[2])
    sees = places[:, None] >= places
    if first is not None:
        sees = sees & (places >= np.array(first)[:, None, :, None])
    scores = np.where(sees, SCALE * queries @ wide_keys.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ wide_values
    of_weights = incoming @ wide_values.swapaxes(-1, -2)
    of_scores = SCALE * weights * (of_weights - (incoming * out).sum(-1, keepdims=True))
    sizes_of_scores = (
        SCALE
        * weights
        * (np.abs(incoming) @ np.abs(wide_values).swapaxes(-1, -2) + (np.abs(incoming) @ np.abs(out).swapaxes(-1, -2)))
    )

    def over_heads(one: "NDArray[np.float64]") -> "NDArray[np.float64]":
        grouped: NDArray[np.float64] = one.reshape(one.shape[0], -1, shared, *one.shape[2:]).sum(2)
        return grouped

    found = [out, of_scores @ wide_keys, over_heads(of_scores.swapaxes(-1, -2) @ queries)]
    found.append(over_heads(weights.swapaxes(-1, -2) @ incoming))
    sizes = [weights @ np.abs(wide_values), sizes_of_scores @ np.abs(wide_keys)]
    sizes.append(over_heads(sizes_of_scores.swapaxes(-1, -2) @ np.abs(queries)))
    sizes.append(over_heads(weights.swapaxes(-1, -2) @ np.abs(incoming)))
    return _Exact(found, sizes)


def _found(inputs: list[mx.array], first: mx.array | None) -> list[mx.array]:
    def attended(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return causal_attention(queries, keys, values, scale=SCALE, first=first)

    def both(queries: mx.array, keys: mx.array, values: mx.array, incoming: mx.array) -> list[mx.array]:
        results, gradients = mx.vjp(attended, [queries, keys, values], [incoming])
        return [*results, *gradients]

    found: list[mx.array] = mx.compile(both)(*inputs)
    mx.eval(found)
    return found


def _require_close(inputs: list[mx.array], first: mx.array | None) -> None:
    """Check sums of L terms in fp32, whose exponentials come from scores with an error of their own.

    A score has D products; its error, in units of the last place, is at most D times the largest score, which is
    relative to the exponential. In 16 bits results are rounded once.
    """
    exact = _exact(inputs, first)
    length, width = inputs[0].shape[2:]
    queries, keys = (np.abs(np.array(one.astype(mx.float32))).max() for one in inputs[:2])
    largest = SCALE * width * float(queries) * float(keys)
    relative = (4 * (length + width) + 4 * width * largest) * 2.0**-24
    for found, expected, size, given in zip(
        _found(inputs, first), exact.values, exact.sizes, [inputs[0], *inputs[:3]], strict=True
    ):
        assert found.shape == given.shape
        assert found.dtype == given.dtype
        rounding = 0.0 if found.dtype == mx.float32 else 2.0**-8
        error = np.abs(np.array(found.astype(mx.float32), np.float64) - expected)
        assert (error <= relative * size + rounding * np.abs(expected) + 1e-30).all()


def _divided(monkeypatch: pytest.MonkeyPatch, *, keeps: bool) -> None:
    """Let blocks have 16 queries, whose exponentials are kept or computed again."""
    monkeypatch.setattr(blockwise_attention, "_BLOCK", 16)
    if not keeps:
        monkeypatch.setattr(blockwise_attention, "_MOST_KEPT", 0)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("length", [1, 7, 16, 40])
@pytest.mark.parametrize(("heads", "grouped"), [(2, 2), (6, 2), (3, 1)])
def test_results_and_gradients_are_those_of_all_scores(
    heads: int,
    grouped: int,
    length: int,
    dtype: mx.Dtype,
    bounded: bool,
    keeps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _divided(monkeypatch, keeps=keeps)
    inputs = [one.astype(dtype) for one in _inputs(heads, grouped, length)]
    _require_close(inputs, _first(length) if bounded else None)


def test_exponentials_that_are_computed_again_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, first = _inputs(6, 2, 40), _first(40)
    found = []
    for keeps in (True, False):
        with monkeypatch.context() as patch:
            _divided(patch, keeps=keeps)
            found.append(_found(inputs, first))
    for kept, again in zip(*found, strict=True):
        assert mx.array_equal(kept, again)


def _ours(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    return causal_attention(queries, keys, values, scale=SCALE)


@pytest.mark.parametrize("keeps", [True, False])
def test_attention_ignores_later_tokens(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _divided(monkeypatch, keeps=keeps)
    queries, keys, values, _ = _inputs(2, 2, 40)
    before = _ours(queries, keys, values)
    keys[:, :, 21:], values[:, :, 21:] = 9.0, 9.0
    after = _ours(queries, keys, values)
    assert mx.array_equal(before[:, :, :21], after[:, :, :21])
    assert not mx.allclose(before[:, :, 21:], after[:, :, 21:])


def test_nan_scores_reach_the_result() -> None:
    queries, keys, values, _ = _inputs(2, 2, 20)
    queries[0, 0, 5, 0] = float("nan")
    assert mx.isnan(_ours(queries, keys, values)[0, 0, 5]).all()
    keys[0, 1, 3, 2] = float("inf")
    assert not mx.isfinite(_ours(queries, keys, values)[0, 1, 3:]).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_long_row_never_holds_all_scores(dtype: mx.Dtype, is_compiled: bool) -> None:
    length = 6144
    inputs = [one[:1].astype(dtype) for one in _inputs(4, 2, length)]
    mx.eval(inputs)
    scores_bytes = 4 * 4 * length * length

    def step(*inputs: mx.array) -> list[mx.array]:
        return mx.vjp(_ours, list(inputs[:3]), [inputs[3]])[1]

    run: Callable[..., list[mx.array]] = mx.compile(step) if is_compiled else step
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(run(*inputs))
    assert mx.get_peak_memory() - before < scores_bytes / 2  # 0.3 here; with kept exponentials 1.0
