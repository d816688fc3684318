"""Functions with a gradient of their own: MLX's result, unless a recorder takes the calls."""

from typing import Any

import mlx.core as mx

from mlxflow.ops.custom_function import CustomFunction, custom_function, disregard, recorded


@custom_function
def _sum_and_product(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
    return x + y, x * y


@_sum_and_product.vjp
def _gradients(primals: Any, incoming: Any, results: Any) -> tuple[mx.array, mx.array]:
    return incoming[0] * 10 + results[1], incoming[1] * primals[0]


def test_the_gradient_is_that_of_the_function_s_own() -> None:
    x, y = mx.array(3.0), mx.array(4.0)
    results, gradients = mx.vjp(_sum_and_product, [x, y], [mx.array(1.0), mx.array(2.0)])
    assert [value.item() for value in results] == [7, 12]
    assert [value.item() for value in gradients] == [22, 6]


def test_a_recorder_takes_the_calls_until_its_block_ends() -> None:
    class Noting:
        def __init__(self) -> None:
            self.calls: list[tuple[CustomFunction, int]] = []
            self.needless: list[mx.array] = []

        def call(self, function: CustomFunction, arguments: tuple[Any, ...]) -> Any:
            self.calls.append((function, len(arguments)))
            return "recorded"

        def disregard(self, result: mx.array) -> None:
            self.needless.append(result)

    noting = Noting()
    x = mx.array(3.0)
    with recorded(noting):
        assert _sum_and_product(x, x) == "recorded"
        disregard(x)
    disregard(x + 1)
    assert len(noting.needless) == 1
    assert noting.needless[0] is x
    assert noting.calls == [(_sum_and_product, 2)]
    assert _sum_and_product.gradients is _gradients
    assert _sum_and_product(x, x)[0].item() == 6
