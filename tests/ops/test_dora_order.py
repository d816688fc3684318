"""DoRA layers that dequantize after their input: the same numbers; memory is in training/test_memory_forecast.py."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear

from mlxflow.ops import dora_order, patching

WIDTH, LAYERS = 64, 3


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    patching.uninstall(DoRALinear, "__call__", by=dora_order.__name__)
    yield
    patching.uninstall(DoRALinear, "__call__", by=dora_order.__name__)


class _Model(nn.Module):  # type: ignore[misc]
    def __init__(self, *, bits: int) -> None:
        super().__init__()
        mx.random.seed(0)
        linear: list[Any] = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
        if bits:
            linear = [nn.QuantizedLinear.from_linear(layer, 64, bits) for layer in linear]
        self.layers = [DoRALinear.from_base(layer) for layer in linear]
        for layer in self.layers:
            layer.linear.freeze()
            layer.lora_b = mx.random.normal(layer.lora_b.shape)
        mx.eval(self.parameters())

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = nn.silu(nn.utils.checkpoint(layer)(x))
        return x


def _step(model: _Model) -> dict[str, mx.array]:
    """Return loss and gradients of a step with recomputed layers."""

    def loss(x: mx.array) -> mx.array:
        return model(x).square().sum()

    value, gradients = nn.value_and_grad(model, loss)(mx.random.normal((4, WIDTH), key=mx.random.key(0)))
    mx.eval(value, gradients)
    return dict(tree_flatten(gradients)) | {"loss": value}


@pytest.mark.parametrize("bits", [0, 4])
def test_a_step_has_the_same_numbers(bits: int) -> None:
    expected = _step(_Model(bits=bits))
    dora_order.install()
    model = _Model(bits=bits)
    found = _step(model)
    assert found.keys() == expected.keys()
    assert not [name for name in found if not mx.array_equal(found[name], expected[name])]


def test_the_weight_of_a_layer_waits_for_its_input() -> None:
    dora_order.install()
    layer = _Model(bits=4).layers[0]
    codes = layer.linear.weight
    taken: list[mx.array] = []
    usual = layer._dequantized_weight

    def weight() -> mx.array:
        taken.append(layer.linear.weight)
        dense: mx.array = usual()
        return dense

    vars(layer)["_dequantized_weight"] = weight
    layer(mx.zeros((1, WIDTH)))
    assert taken[0] is not codes
    assert layer.linear.weight is codes
