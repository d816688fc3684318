"""Attention by blocks of queries is that of all queries, and holds the scores of some."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from mlxflow.ops import query_blocks
from mlxflow.ops.attention_overrides import plain_attention

LENGTH, WIDTH = 13, 8
ATTENTIONS: dict[str, Callable[..., mx.array]] = {"plain": plain_attention, "MLX": mx.fast.scaled_dot_product_attention}


def _inputs(dtype: mx.Dtype, *, length: int = LENGTH, keys: int = LENGTH) -> list[mx.array]:
    """Return queries, keys, values and the incoming gradient."""
    seeds = mx.random.split(mx.random.key(0), 4)
    shapes = [(2, 6, length, WIDTH), (2, 2, keys, WIDTH), (2, 2, keys, WIDTH), (2, 6, length, WIDTH)]
    return [mx.random.normal(shape, key=seed).astype(dtype) for shape, seed in zip(shapes, seeds, strict=True)]


def _divided(attention: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return an attention function by blocks of queries."""

    def attended(*inputs: mx.array, **named: Any) -> mx.array:
        return query_blocks.attend(attention, *inputs, **named)

    return attended


def _both(function: Callable[..., mx.array], inputs: list[mx.array], sinks: mx.array | None, **named: Any) -> Any:
    """Return the result, and the gradients of queries, keys, values and sinks."""

    def attended(queries: mx.array, keys: mx.array, values: mx.array, *sinks: mx.array) -> mx.array:
        return function(queries, keys, values, **named, **({"sinks": sinks[0]} if sinks else {}))

    primals = [*inputs[:3], *([] if sinks is None else [sinks])]
    results, gradients = mx.vjp(attended, primals, [inputs[3]])
    return [*results, *gradients]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks have 4 or 5 queries."""
    monkeypatch.setattr(query_blocks, "_MOST_AT_ONCE", 0)
    monkeypatch.setattr(query_blocks, "_MOST_OF_BLOCK", 5 * 2 * 6 * LENGTH * 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mask", ["causal", None, "of queries", "of rows", "of keys"])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_blocks_of_queries_give_the_same(attention: str, mask: str | None, has_sinks: bool, dtype: mx.Dtype) -> None:
    sees = mx.random.bernoulli(0.7, (LENGTH, LENGTH), key=mx.random.key(1)) | mx.eye(LENGTH, dtype=mx.bool_)
    keys = mx.arange(LENGTH) != 3
    masks = {"of queries": sees, "of rows": mx.stack([sees, sees.T])[:, None], "of keys": keys[None]}
    inputs, named = _inputs(dtype), {"scale": 0.4, "mask": masks.get(mask or "", mask)}
    sinks = mx.random.normal((6,), key=mx.random.key(2)).astype(dtype) if has_sinks else None
    found = _both(
        lambda *given, **more: query_blocks.attend(ATTENTIONS[attention], *given, **more), inputs, sinks, **named
    )
    wide = [one.astype(mx.float32) for one in inputs]
    expected = _both(plain_attention, wide, None if sinks is None else sinks.astype(mx.float32), **named)
    # sums of L or D terms, each of at most a few roundings; those of an array's largest number
    allowed = (LENGTH + WIDTH) * 2.0**-24 * 16 if dtype == mx.float32 else 8 * 2.0**-8
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == dtype
        assert float(mx.abs(one.astype(mx.float32) - other).max()) <= allowed * max(1.0, float(mx.abs(other).max()))


@pytest.mark.usefixtures("small_blocks")
def test_the_last_queries_of_more_keys_see_those_before_them() -> None:
    inputs = _inputs(mx.float32, length=9)
    given = {"scale": 0.4, "mask": "causal"}
    found = query_blocks.attend(plain_attention, *inputs[:3], **given)  # type: ignore[arg-type]
    assert mx.allclose(found, plain_attention(*inputs[:3], **given), atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_blocks")
def test_a_mask_of_numbers_keeps_its_gradient() -> None:
    inputs, mask = _inputs(mx.float32), mx.random.normal((LENGTH, LENGTH), key=mx.random.key(1))

    def loss(function: Callable[..., mx.array], mask: mx.array) -> mx.array:
        return (function(*inputs[:3], scale=0.4, mask=mask) * inputs[3]).sum()

    found = mx.grad(lambda mask: loss(_divided(plain_attention), mask))
    expected = mx.grad(lambda mask: loss(plain_attention, mask))
    assert mx.array_equal(found(mask), expected(mask))
    assert expected(mask).any()


def test_few_scores_are_computed_at_once() -> None:
    inputs, named = _inputs(mx.float32)[:3], {"scale": 0.4, "mask": "causal"}
    found = query_blocks.attend(plain_attention, *inputs, **named)  # type: ignore[arg-type]
    assert mx.array_equal(found, plain_attention(*inputs, **named))  # type: ignore[arg-type]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_scores_of_some_queries_are_held(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_blocks, "_MOST_AT_ONCE", 32 << 20)
    monkeypatch.setattr(query_blocks, "_MOST_OF_BLOCK", 1 << 20)
    inputs = _inputs(mx.float32, length=1536, keys=1536)
    mx.eval(inputs)

    def peak(function: Callable[..., mx.array]) -> int:
        def step(*inputs: mx.array) -> list[mx.array]:
            found: list[mx.array] = _both(function, list(inputs), None, scale=0.4, mask="causal")
            return found

        run = mx.compile(step) if is_compiled else step
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(run(*inputs))
        return mx.get_peak_memory()

    whole = peak(plain_attention)
    assert whole > 2 * 6 * 1536**2 * 4 * 2
    assert peak(_divided(plain_attention)) < whole / 3
