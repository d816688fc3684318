from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlxflow.ops.gradient_checkpointing import recomputed
from tests.training.test_step import _difference, _marks, _model, _step


def test_checkpointed_layers_give_the_same_gradient_and_are_restored() -> None:
    batch = mx.random.randint(0, 50, (4, 9), key=mx.random.key(3))
    model = _model()
    kind = type(model.layers[0])
    plain = _step(model, optim.SGD(1.0), max_grad_norm=1.0).compute(batch, _marks(4, 9))
    calls = []
    for every, expected in ((1, [True, True]), (2, [True, False])):
        with recomputed(model, every=every):
            calls.append([type(layer) is not kind for layer in model.layers])
            again = _step(model, optim.SGD(1.0), max_grad_norm=1.0).compute(batch, _marks(4, 9))
            assert _difference(again, plain) < 1e-6
        assert calls[-1] == expected
        assert all(type(layer) is kind for layer in model.layers)


class _Dropping(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array(1.0)
        self.first, self.second = nn.Dropout(0.5), nn.Dropout(0.3)

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = self.second(self.first(x * self.weight))
        return result


class _TwoDropping(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.layers = [_Dropping(), _Dropping()]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


def test_dropout_has_the_same_mask_when_a_layer_is_recomputed() -> None:
    """The gradient of a sum of x times w, at w = 1, is the sum itself, if both passes drop the same numbers."""
    model = _TwoDropping()
    model.train()

    def loss(weights: Any, x: mx.array) -> mx.array:
        model.update(weights)
        total: mx.array = model(x).sum()
        return total

    weights, random = model.trainable_parameters(), mx.random.state
    sums = []
    with recomputed(model, every=1):
        compute = mx.compile(mx.value_and_grad(loss), inputs=[random], outputs=[random])
        for _ in range(2):
            value, gradients = compute(weights, mx.ones(1000))
            model.update(weights)
            sums.append(float(value))
            for layer in gradients["layers"]:
                assert float(layer["weight"]) == pytest.approx(sums[-1], rel=1e-5)
    assert sums[0] != sums[1]
    assert 600 < sums[0] < 1400
