from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from mlxflow.ops.gradient_checkpointing import recomputed
from tests.training.test_step import _difference, _marks, _model, _step


def test_checkpointed_layers_give_the_same_gradient_and_are_restored() -> None:
    batch = mx.random.randint(0, 50, (4, 9), key=mx.random.key(3))
    model = _model()
    kind = type(model.layers[0])
    plain = _step(model, optim.SGD(1.0), max_grad_norm=1.0).compute(batch, _marks(4, 9))
    calls = []
    for every, segment, expected in ((1, 1, [True, True]), (2, 1, [True, False]), (1, 2, [True, True])):
        with recomputed(model, every=every, segment=segment):
            calls.append([type(layer) is not kind for layer in model.layers])
            again = _step(model, optim.SGD(1.0), max_grad_norm=1.0).compute(batch, _marks(4, 9))
            assert _difference(again, plain) < 1e-6
        assert calls[-1] == expected
        assert all(type(layer) is kind for layer in model.layers)


def _summed(model: nn.Module) -> Callable[[Any, mx.array], mx.array]:
    """Return the sum of a model's result as a function of its weights and input."""

    def total(weights: Any, x: mx.array) -> mx.array:
        model.update(weights)
        result: mx.array = model(x).sum()
        return result

    return total


class _Scaling(nn.Module):  # type: ignore[misc]
    """Counts its forward passes; may return None beside its result, or a copy of what it was given."""

    def __init__(self, result: str) -> None:
        super().__init__()
        self.weight = mx.array(2.0)
        self._result, self._calls = result, [0]

    def __call__(self, x: mx.array) -> Any:
        self._calls[0] += 1
        y = x * mx.sin(self.weight * x)
        return (y, None) if self._result == "pair" else y


class _Stack(nn.Module):  # type: ignore[misc]
    def __init__(self, result: str, count: int) -> None:
        super().__init__()
        self.layers = [_Scaling(result) for _ in range(count)]
        self._result = result

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
            if self._result == "pair":
                x = x[0]
            if self._result == "changed":
                x = x + 1
        return x


@pytest.mark.parametrize(
    ("result", "segment", "calls"),
    [
        # forward, then as part of the rest of its segment, then in its segment's backward pass, then in its own
        ("array", 1, [2, 2, 2, 2, 2]),
        ("array", 2, [4, 3, 4, 3, 2]),
        ("pair", 2, [2, 2, 2, 2, 2]),
        ("changed", 2, [2, 2, 2, 2, 2]),
    ],
)
def test_layers_that_pass_one_array_on_form_segments(result: str, segment: int, calls: list[int]) -> None:
    model = _Stack(result, 5)
    x = mx.random.normal((4,), key=mx.random.key(0))

    loss = _summed(model)
    weights = model.trainable_parameters()
    plain = mx.grad(loss, argnums=(0, 1))(weights, x)
    for layer in model.layers:
        layer._calls[0] = 0
    with recomputed(model, every=1, segment=segment):
        found = mx.grad(loss, argnums=(0, 1))(weights, x)
        mx.eval(found)
    counted = [layer._calls[0] for layer in model.layers]
    for (_, value), (_, expected) in zip(tree_flatten(found), tree_flatten(plain), strict=True):
        assert mx.allclose(value, expected, rtol=1e-6, atol=1e-6)
    assert counted == calls


class _Named(nn.Module):  # type: ignore[misc]
    """Layers that get arrays by name and within a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [_NamedLayer() for _ in range(3)]

    def __call__(self, x: mx.array) -> mx.array:
        past = [x * 2]
        for layer in self.layers:
            x, past = layer(inputs=x, past=(past, None), mask="causal")
        return x + past[0]


class _NamedLayer(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.array(1.5)

    def __call__(self, inputs: mx.array, past: Any, mask: str) -> tuple[mx.array, list[mx.array]]:
        ((earlier,), nothing) = past
        assert nothing is None
        assert mask == "causal"
        return mx.sin(inputs * self.weight) * earlier, [earlier + inputs]


def test_arrays_by_name_and_in_tuples_have_gradients_through_recomputed_layers() -> None:
    model, x = _Named(), mx.random.normal((4,), key=mx.random.key(0))

    loss = _summed(model)
    weights = model.trainable_parameters()
    plain = mx.grad(loss, argnums=(0, 1))(weights, x)
    for segment in (1, 2):
        with recomputed(model, every=1, segment=segment):
            found = mx.grad(loss, argnums=(0, 1))(weights, x)
            for (_, value), (_, expected) in zip(tree_flatten(found), tree_flatten(plain), strict=True):
                assert mx.allclose(value, expected, rtol=1e-6, atol=1e-6)


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

    loss = _summed(model)
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
