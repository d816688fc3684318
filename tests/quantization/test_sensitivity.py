import mlx.core as mx
import pytest

from mlxflow.quantization.codec import pack, round_trip
from mlxflow.quantization.sensitivity import measure_costs, projected_costs
from tests.quantization.test_budget import CANDIDATES, OBJECTIVE, _candidates, _llama, _rows


def test_costs_are_half_the_squared_error_times_the_squared_gradients_of_each_row() -> None:
    model = _llama()
    path, setting = "model.layers.0.mlp.down_proj", CANDIDATES[0]
    tokens, marks = _rows()
    costs = measure_costs(model, {path: [setting]}, tokens, marks, objective=OBJECTIVE, dtype=None)
    layer = dict(model.named_modules())[path]
    dense, total = layer.weight, 0.0

    def loss(weight: mx.array, row: int) -> mx.array:
        layer.weight = weight
        return OBJECTIVE(model, tokens[row : row + 1], marks[row : row + 1])[0]

    for row in range(len(tokens)):
        gradient = mx.grad(loss)(dense, row)
        total += float(((dense - round_trip(dense, setting)).square() * gradient.square()).sum())
    layer.weight = dense
    assert costs[path][setting] == pytest.approx(total / 2 / (4 * 8), rel=1e-4)


def test_projected_costs_are_half_the_squared_product_of_gradient_and_error() -> None:
    model = _llama()
    path, setting = "model.layers.0.mlp.down_proj", CANDIDATES[0]
    tokens, marks = _rows()
    layer = dict(model.named_modules())[path]
    dense, total, before = layer.weight, 0.0, mx.array(model(tokens))
    packed = {one: {path: pack(dense, one)} for one in CANDIDATES}
    costs = projected_costs(model, packed, tokens, marks, objective=OBJECTIVE)[path]
    assert mx.array_equal(model(tokens), before)

    def loss(weight: mx.array, row: int) -> mx.array:
        layer.weight = weight
        return OBJECTIVE(model, tokens[row : row + 1], marks[row : row + 1])[0]

    for row in range(len(tokens)):
        gradient = mx.grad(loss)(dense, row)
        total += float(((dense - round_trip(dense, setting)) * gradient).sum()) ** 2
    layer.weight = dense
    assert costs[setting] == pytest.approx(total / 2 / (4 * 8), rel=1e-4)
    assert costs[CANDIDATES[-1]] < 0.1 * costs[CANDIDATES[0]]


def test_fewer_bits_cost_more_and_the_model_is_unchanged() -> None:
    model = _llama()
    tokens, marks = _rows()
    before = mx.array(model(tokens))
    costs = measure_costs(model, _candidates(model), tokens, marks, objective=OBJECTIVE, dtype=mx.bfloat16)
    for told in costs.values():
        prices = [told[one] for one in CANDIDATES]
        assert prices == sorted(prices, reverse=True)
        assert prices[-1] >= 0
    assert mx.array_equal(model(tokens), before)
