"""Graphs of functions that derive gradients through custom functions and checkpoints; nothing is computed."""

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.ops import graph_trace
from mlxflow.ops.custom_function import custom_function
from mlxflow.ops.graph_trace import CUSTOM, Operation, Traced, Value, _compiles, in_order, trace


@custom_function
def _cubed(x: mx.array) -> mx.array:
    return x * x * x


@_cubed.vjp
def _gradients(x: mx.array, incoming: mx.array, _: mx.array) -> mx.array:
    return incoming * mx.tan(x)  # not the derivative: what is traced shall be this function


def _names(traced: Traced) -> Counter[str]:
    return Counter(operation.name for operation in traced.operations)


def _is_in_order(traced: Traced) -> bool:
    makers = {value.name for operation in traced.operations for value in operation.outputs}
    done: set[str] = set()
    for operation in traced.operations:
        if any(name in makers and name not in done for name in operation.inputs):
            return False
        done.update(value.name for value in operation.outputs)
    return all(value.name in done for value in traced.outputs)


def test_a_custom_function_has_its_own_gradient_in_the_graph() -> None:
    def step(w: mx.array, x: mx.array) -> list[mx.array]:
        value, gradient = mx.value_and_grad(lambda w: mx.exp(_cubed(w * x)).sum())(w)
        return [value, gradient]

    traced = trace(step, [mx.zeros((4, 3)), mx.zeros((4, 3))], prefix="step ")
    names = _names(traced)
    assert names["Tan"] == names[CUSTOM] == names["Exp"] == 1
    assert [value.shape for value in traced.outputs] == [(), (4, 3)]
    assert [value.nbytes for value in traced.inputs] == [48, 48]
    assert all(value.name.startswith("step ") for value in traced.inputs)
    assert _is_in_order(traced)


def test_a_compiled_function_of_what_a_custom_function_returned_is_traced_as_it_is_written() -> None:
    """On a GPU a recomputed layer's `nn.silu` has such an argument; MLX would compile it, and not export it."""
    activated = custom_function(nn.silu)
    activated.vjp(lambda x, incoming, _: incoming * mx.sigmoid(x))

    def step(w: mx.array) -> list[mx.array]:
        return list(mx.value_and_grad(lambda w: mx.checkpoint(lambda w: activated(_cubed(w)))(w).sum())(w))

    assert _compiles()
    names = _names(trace(step, [mx.zeros(5)], prefix=""))
    assert names["Sigmoid"] == 2  # forward and gradient
    assert not any(name.startswith("Compiled") for name in names)
    assert _compiles()


def test_the_fused_cross_entropy_of_a_gpu_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX cannot export it, so that no memory was predicted there; a stand-in with the same arrays can."""

    def not_exported(*_: mx.array) -> mx.array:
        raise ValueError("[export_function] Unable to get state for primitive CrossEntropy")

    def losses(logits: mx.array) -> list[mx.array]:
        return [nn.losses.cross_entropy(logits, mx.array([1, 2, 3]))]

    monkeypatch.setattr(graph_trace, "_fuses_losses", lambda: True)
    monkeypatch.setattr(mx.fast, "cross_entropy", not_exported)
    traced = trace(losses, [mx.zeros((3, 8), mx.bfloat16)], prefix="")
    assert _names(traced)["LogSumExp"] == 1
    assert traced.outputs[0].shape == (3,)
    assert mx.fast.cross_entropy is not_exported


def test_a_trace_leaves_compilation_disabled_where_it_was() -> None:
    mx.disable_compile()
    try:
        trace(lambda x: [nn.silu(x)], [mx.zeros(5)], prefix="")
        assert not _compiles()
    finally:
        mx.enable_compile()


def test_a_checkpoint_is_computed_again_for_its_gradient() -> None:
    def step(w: mx.array) -> list[mx.array]:
        block = mx.checkpoint(lambda w: mx.sin(_cubed(mx.exp(w))))
        return list(mx.value_and_grad(lambda w: block(w).sum())(w))

    traced = trace(step, [mx.zeros(5)], prefix="")
    names = _names(traced)
    assert (names["Exp"], names["Depends"], names["Tan"]) == (2, 1, 1)
    assert _is_in_order(traced)


def test_traced_functions_compute_the_same_afterwards() -> None:
    x = mx.array([1.0, 2.0])
    before = mx.grad(lambda x: _cubed(x).sum())(x)
    trace(lambda x: [mx.value_and_grad(lambda x: _cubed(x).sum())(x)[1]], [x], prefix="")
    assert mx.array_equal(mx.grad(lambda x: _cubed(x).sum())(x), before)
    with pytest.raises(ZeroDivisionError):
        trace(lambda _: [mx.array(1 / 0)], [x], prefix="")
    assert mx.array_equal(mx.grad(lambda x: _cubed(x).sum())(x), before)


def test_a_graph_with_a_circle_is_refused() -> None:
    one = Operation("Exp", "", ("b",), (Value("a", (), 4),))
    with pytest.raises(ValueError, match="needs its own result"):
        in_order([one, one._replace(inputs=("a",), outputs=(Value("b", (), 4),))], ["a"])
