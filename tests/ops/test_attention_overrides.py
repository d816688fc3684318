"""Which attention a step computes: by blocks on the CPU, in a fixed order on a GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.ops import attention_overrides, blockwise_attention, query_blocks
from mlxflow.ops.attention_overrides import Heads, causal_by_blocks, first_causal_heads
from mlxflow.ops.overrides import OperationOverrides
from mlxflow.training.objective import plain_objective
from mlxflow.training.optimizers import make_optimizer
from mlxflow.training.step import Step
from mlxflow.training.update import Update
from tests.small_models import llama

pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="serves on the CPU only")


def _inputs(heads: int, grouped: int, length: int) -> tuple[mx.array, ...]:
    keys = mx.random.split(mx.random.key(length), 4)
    shapes = [(2, heads, length, 8), (2, grouped, length, 8), (2, grouped, length, 8), (2, heads, length, 8)]
    return tuple(mx.random.normal(shape, key=key) * 2 for shape, key in zip(shapes, keys, strict=True))


def _largest(x: mx.array) -> mx.array:
    return mx.maximum(mx.abs(x).max(), 1.0)


def _theirs(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.4, mask="causal")


def _attended(*inputs: mx.array, **named: Any) -> mx.array:
    return mx.fast.scaled_dot_product_attention(*inputs, scale=0.4, **named)


def test_calls_that_are_not_causal_or_of_several_types_use_mlx() -> None:
    *inputs, _ = _inputs(2, 2, 12)
    mask = mx.random.bernoulli(0.7, (12, 12), key=mx.random.key(0)) | mx.eye(12, dtype=mx.bool_)
    mixed = [inputs[0], *(part.astype(mx.bfloat16) for part in inputs[1:])]

    def results() -> list[mx.array]:
        sinks = mx.array([0.5, -1.0])
        return [
            _attended(*inputs, mask=mask),
            _attended(*inputs, mask=None),
            _attended(*inputs, mask="causal", sinks=sinks),
            _attended(*mixed, mask="causal"),
            _attended(inputs[0][:, :, 4:], *inputs[1:], mask="causal"),
        ]

    plain = mx.fast.scaled_dot_product_attention
    with causal_by_blocks():
        assert mx.fast.scaled_dot_product_attention is not plain
        within = results()
    assert mx.fast.scaled_dot_product_attention is plain
    assert all(mx.array_equal(one, other) for one, other in zip(within, results(), strict=True))


def test_windows_documents_and_16_bits_are_computed_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import base

    seen: list[tuple[mx.Dtype, bool]] = []
    plain = blockwise_attention.causal_attention

    def noted(queries: mx.array, *others: mx.array, first: mx.array | None, **named: Any) -> mx.array:
        seen.append((queries.dtype, first is not None))
        return plain(queries, *others, first=first, **named)

    monkeypatch.setattr(attention_overrides, "causal_attention", noted)
    *inputs, _ = _inputs(2, 2, 20)
    half = [part.astype(mx.bfloat16) for part in inputs]

    def results() -> list[mx.array]:
        window: mx.array = base.create_causal_mask(20, 0, window_size=4)
        return [_attended(*inputs, mask=window), _attended(*half, mask="causal")]

    with causal_by_blocks():
        within = results()
        short = [part[:, :, :15] for part in half]
        few = _attended(*short, mask="causal")
    assert seen == [(mx.float32, True), (mx.bfloat16, False)]
    for one, other, allowed in zip(within, results(), (2e-5, 2**-6), strict=True):
        assert float(mx.abs(one - other).max()) <= allowed * float(_largest(other))
    assert mx.array_equal(few, _theirs(*short)), "MLX is faster with a few tokens"
    seen.clear()
    with causal_by_blocks(only_long=True):
        assert mx.array_equal(_attended(*inputs, mask="causal"), _theirs(*inputs))
        assert not seen
        monkeypatch.setattr(query_blocks, "_MOST_AT_ONCE", 100)
        _attended(*inputs, mask="causal")
    assert seen == [(mx.float32, False)]


@pytest.mark.parametrize("is_short", [True, False])
def test_attention_that_holds_all_scores_is_divided_where_rows_are_long(
    is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    *inputs, _ = _inputs(2, 2, 12)
    sizes: list[int] = []
    plain = mx.fast.scaled_dot_product_attention

    def noted(queries: mx.array, *others: mx.array, **named: Any) -> mx.array:
        sizes.append(queries.shape[2])
        return plain(queries, *others, **named)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", noted)
    if not is_short:
        monkeypatch.setattr(query_blocks, "_MOST_AT_ONCE", 100)
        monkeypatch.setattr(query_blocks, "_MOST_OF_BLOCK", 5 * 2 * 2 * 12 * 4)
    with attention_overrides.long_rows_by_blocks():
        found = _attended(*inputs, mask="causal")
    assert sizes == ([12] if is_short else [5, 5, 2])
    assert mx.allclose(found, _theirs(*inputs), atol=1e-5)
    sizes.clear()
    with attention_overrides.in_fixed_order(None):  # MLX's attention in fp32 has a fixed order, and all scores
        _attended(*inputs, mask="causal")
    assert sizes == ([12] if is_short else [5, 5, 2])
    sizes.clear()
    with attention_overrides.long_rows_by_blocks():  # as on CUDA, where 16 bits are fused
        _attended(*(part.astype(mx.bfloat16) for part in inputs), mask="causal")
    assert sizes == [12]


def test_a_training_step_with_blockwise_attention_matches_plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise_attention, "_BLOCK", 16)
    tokens = mx.random.randint(0, 50, (3, 41), key=mx.random.key(0))
    marks = mx.full((3, 41), 3, mx.uint8)

    def first_norm_and_loss(*, blocks: bool) -> list[float]:
        model, _ = llama(context_length=40)
        model.train()
        optimizer = make_optimizer(name="adamw", schedule=lambda _: mx.array(1e-2), weight_decay=0.0, options={})
        update = Update(model, optimizer, max_grad_norm=1.0, has_masters=False)
        step = Step(
            model, update, plain_objective(masks_documents=False), overrides=OperationOverrides(is_enabled=blocks)
        )
        outcomes = [step.update(step.compute(tokens, marks)) for _ in range(3)]
        return [float(value) for outcome in outcomes for value in (outcome.loss, outcome.norm)]

    assert first_norm_and_loss(blocks=True) == pytest.approx(first_norm_and_loss(blocks=False), rel=1e-4)


# --- in a fixed order: what is for CUDA, on the CPU


def _half(heads: int = 6, grouped: int = 2, length: int = 9) -> list[mx.array]:
    return [part.astype(mx.bfloat16) for part in _inputs(heads, grouped, length)]


@pytest.mark.parametrize("mask", ["causal", None, "truths", "a row's own", "added"])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_plain_attention_is_what_mlx_computes(mask: str | None, has_sinks: bool) -> None:
    queries, keys, values, incoming = _inputs(6, 2, 9)
    sees = mx.random.bernoulli(0.7, (9, 9), key=mx.random.key(0)) | mx.eye(9, dtype=mx.bool_)
    rows = mx.stack([sees, mx.tril(mx.ones((9, 9), mx.bool_))])[:, None]
    masks = {"truths": sees, "a row's own": rows, "added": mx.where(sees, 0.5, -3.0)}
    named = {"scale": 0.4, "mask": masks.get(mask or "", mask)}
    if has_sinks:
        named["sinks"] = mx.random.normal((6,), key=mx.random.key(1))

    def both(function: Callable[..., mx.array]) -> list[mx.array]:
        values_, gradients = mx.vjp(lambda *inputs: function(*inputs, **named), [queries, keys, values], [incoming])
        return [*values_, *gradients]

    theirs = both(mx.fast.scaled_dot_product_attention)
    for found, expected in zip(both(attention_overrides.plain_attention), theirs, strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=2e-5 * float(_largest(expected)))


def test_queries_that_are_the_last_of_more_keys_see_those_before_them() -> None:
    queries, keys, values, _ = _inputs(2, 2, 9)
    last = attention_overrides.plain_attention(queries[:, :, 6:], keys, values, scale=0.4, mask="causal")
    assert mx.allclose(last, _theirs(queries, keys, values)[:, :, 6:], atol=1e-5)


def test_deterministic_attention_uses_the_kernel_for_causal_16_bit_calls() -> None:
    asked = []

    def kernel(
        queries: mx.array, keys: mx.array, values: mx.array, scale: float, first: mx.array | None
    ) -> mx.array | None:
        asked.append((queries.dtype, queries.shape[2], scale))
        assert first is None
        return mx.zeros_like(queries) if queries.shape[2] > 4 else None

    fast, half = mx.fast, _half()[:3]
    with attention_overrides.in_fixed_order(kernel):
        served = fast.scaled_dot_product_attention(*half, scale=0.4, mask="causal")
        too_short = fast.scaled_dot_product_attention(*(part[:, :, :3] for part in half), scale=0.4, mask="causal")
        free = fast.scaled_dot_product_attention(*half, scale=0.4, mask=None)
        full = fast.scaled_dot_product_attention(*_inputs(6, 2, 9)[:3], scale=0.4, mask="causal")
    assert asked == [(mx.bfloat16, 9, 0.4), (mx.bfloat16, 3, 0.4)]
    assert not served.any()
    short = [part[:, :, :3] for part in half]
    assert mx.array_equal(too_short, attention_overrides.plain_attention(*short, scale=0.4, mask="causal"))
    assert mx.array_equal(free, attention_overrides.plain_attention(*half, scale=0.4))
    assert mx.array_equal(full, _theirs(*_inputs(6, 2, 9)[:3])), "MLX's own adds up in one order there"


def test_first_causal_heads_reads_the_head_size_without_computing() -> None:
    model, other = llama(hidden_size=48, num_heads=3, num_kv_heads=1)[0], nn.Linear(8, 3)
    random: Any = mx.random
    plain, state = mx.fast.scaled_dot_product_attention, mx.array(random.state[0])
    model.train()
    find = partial(first_causal_heads, context_length=8)
    assert find(model, masks_documents=False) == Heads(16, is_bounded=False)
    assert find(model, masks_documents=True) == Heads(16, is_bounded=True)
    assert find(other, masks_documents=False) is None
    assert mx.fast.scaled_dot_product_attention is plain
    assert mx.array_equal(random.state[0], state)
    assert all(module.training for module in model.modules())
