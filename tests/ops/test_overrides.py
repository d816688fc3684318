from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxflow.ops.overrides import OperationOverrides, replaced_operations
from mlxflow.training.objective import plain_objective
from tests.small_models import llama


def _operations() -> list[object]:
    """Return what a step may have replaced."""
    return [
        nn.Linear.__call__,
        nn.Embedding.as_linear,
        nn.Embedding.__call__,
        mx.fast.scaled_dot_product_attention,
    ]


def _replaced(how: OperationOverrides) -> list[bool]:
    model, before = llama()[0], _operations()
    with replaced_operations(model, mx.zeros((1, 5), mx.int32), how):
        inside = _operations()
    assert _operations() == before
    return [now is not then for now, then in zip(inside, before, strict=True)]


def test_without_replacement_all_operations_are_those_of_mlx() -> None:
    assert not any(_replaced(OperationOverrides(is_enabled=False)))


def test_an_error_restores_the_operations() -> None:
    before = _operations()
    with (
        pytest.raises(ValueError, match="stop"),
        replaced_operations(llama()[0], mx.zeros((1, 5)), OperationOverrides()),
    ):
        raise ValueError("stop")
    assert _operations() == before


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="other operations are replaced on a GPU")
def test_products_and_attention_are_replaced_on_the_cpu() -> None:
    assert _replaced(OperationOverrides()) == [True, True, False, True]


@pytest.mark.parametrize(
    ("on_metal", "how", "expected"),
    [
        (False, OperationOverrides(), [True, True, True, True]),
        (False, OperationOverrides(is_deterministic=False), [True, True, False, True]),
        (True, OperationOverrides(keeps_mlx_attention=True), [True, True, True, True]),
        (True, OperationOverrides(), [True, True, True, True]),
    ],
)
def test_lookups_are_replaced_on_a_gpu_and_attention_of_long_rows_at_least(
    on_metal: bool, how: OperationOverrides, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx.metal, "is_available", lambda: on_metal)
    assert _replaced(how) == expected


@pytest.mark.parametrize(("on_metal", "is_replaced"), [(True, True), (False, False)])
def test_attention_in_fp32_is_replaced_on_metal_only(
    on_metal: bool, is_replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal MLX's kernels for the gradient take fp32, too; cuDNN does not."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx.metal, "is_available", lambda: on_metal)
    called: list[bool] = []
    plain = mx.fast.scaled_dot_product_attention

    def attend(*arrays: mx.array, **named: Any) -> mx.array:
        called.append(True)
        return plain(*arrays, **named)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    queries = mx.zeros((1, 2, 5, 8))
    with replaced_operations(llama()[0], mx.zeros((1, 5), mx.int32), OperationOverrides()):
        called.clear()  # the model was run once
        mx.fast.scaled_dot_product_attention(queries, queries, queries, scale=0.4, mask="causal")
    assert (not called) is is_replaced


def test_causal_attention_on_cuda_calls_the_given_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    called: list[mx.array] = []

    def kernel(queries: mx.array, keys: mx.array, values: mx.array, scale: float, first: mx.array | None) -> mx.array:
        called.append(queries)
        return queries

    queries = mx.zeros((1, 2, 5, 8), mx.bfloat16)
    with replaced_operations(llama()[0], mx.zeros((1, 5), mx.int32), OperationOverrides(attention=kernel)):
        mx.fast.scaled_dot_product_attention(queries, queries, queries, scale=0.4, mask="causal")
    assert len(called) == 1


def test_replaced_operations_have_the_gradients_of_mlx() -> None:
    model, _ = llama(seed=2)
    tokens = mx.random.randint(1, 50, (3, 9), key=mx.random.key(0))
    marks = mx.full((3, 9), 3, mx.uint8)
    objective = plain_objective(masks_documents=False)

    def gradients(how: OperationOverrides) -> dict[str, mx.array]:
        with replaced_operations(model, tokens, how):
            step = nn.value_and_grad(model, lambda: objective(model, tokens, marks)[0])
            return dict(tree_flatten(step()[1]))

    expected = gradients(OperationOverrides(is_enabled=False))
    for name, found in gradients(OperationOverrides()).items():
        # fewer than 512 additions in fp32 on the way to a gradient: as many units in the last place of the largest
        assert mx.abs(found - expected[name]).max() <= 512 * 2**-23 * mx.abs(expected[name]).max(), name
