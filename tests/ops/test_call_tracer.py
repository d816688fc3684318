"""Calls of custom functions while gradients are derived: each has its own gradient, wherever it is called."""

from typing import Any

import mlx.core as mx

from mlxflow.ops.custom_function import custom_function, disregard
from mlxflow.ops.graph_trace import CUSTOM, trace
from tests.ops.test_graph_trace import _cubed, _is_in_order, _names


@custom_function
def _doubled(x: mx.array) -> mx.array:
    return x + x


@_doubled.vjp
def _other_gradients(x: mx.array, incoming: mx.array, _: mx.array) -> mx.array:
    return incoming * mx.cosh(x)


def test_a_gradient_within_the_gradient_of_a_custom_function() -> None:
    @custom_function
    def outer(x: mx.array) -> list[mx.array]:
        return [_cubed(x), x + 1]

    @outer.vjp
    def gradients(x: mx.array, incoming: Any, _: Any) -> Any:
        found: mx.array = mx.vjp(_cubed, [x], [incoming[0]])[1][0]
        return mx.add(found, incoming[1])

    def step(w: mx.array) -> list[mx.array]:
        return list(mx.value_and_grad(lambda w: mx.multiply(*outer(w)).sum())(w))

    traced = trace(step, [mx.zeros(5)], prefix="")
    assert _names(traced)["Tan"] == 1
    assert _is_in_order(traced)


def test_an_array_gets_the_gradients_of_all_functions_that_take_it() -> None:
    def step(w: mx.array) -> list[mx.array]:
        def loss(w: mx.array) -> mx.array:
            x = mx.exp(w)
            return mx.sum(_cubed(x) * _doubled(x))

        return list(mx.value_and_grad(loss)(w))

    names = _names(trace(step, [mx.zeros(5)], prefix=""))
    assert names["Tan"] == names["Cosh"] == 1


def test_a_call_whose_result_nothing_needs_takes_no_part_in_a_gradient() -> None:
    def step(w: mx.array) -> list[mx.array]:
        def loss(w: mx.array) -> mx.array:
            x = mx.exp(w)
            needless = _cubed(x)
            disregard(needless)
            return mx.sum(_doubled(x))

        return list(mx.value_and_grad(loss)(w))

    names = _names(trace(step, [mx.zeros(5)], prefix=""))
    assert (names["Tan"], names["Cosh"]) == (0, 1)


def test_a_call_within_another_function_is_an_operation_of_its_own() -> None:
    @custom_function
    def outer(x: mx.array) -> Any:
        return _cubed(x) + 1

    assert _names(trace(lambda x: [outer(x)], [mx.zeros(5)], prefix=""))[CUSTOM] == 2
