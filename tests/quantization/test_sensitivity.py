import copy
import math
from collections.abc import Callable
from pathlib import Path
from statistics import stdev

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxflow.quantization import sensitivity
from mlxflow.quantization.codec import pack, round_trip
from mlxflow.quantization.sensitivity import error_slopes, measure_costs, projected_costs
from mlxflow.quantization.streamed_gradients import GradientRows
from tests.quantization.test_budget import CANDIDATES, OBJECTIVE, _candidates, _llama, _rows

PATH = "model.layers.0.mlp.down_proj"


def _loading(model: nn.Module) -> Callable[[], nn.Module]:
    return lambda: copy.deepcopy(model)


def _gradients(model: nn.Module, path: str) -> list[mx.array]:
    """Return the gradient of each row's loss in a weight."""
    model = copy.deepcopy(model)
    layer = dict(model.named_modules())[path]
    dense = layer.weight
    tokens, marks = _rows()

    def loss(weight: mx.array, row: int) -> mx.array:
        layer.weight = weight
        return OBJECTIVE(model, tokens[row : row + 1], marks[row : row + 1])[0]

    return [mx.grad(loss)(dense, row) for row in range(len(tokens))]


@pytest.mark.parametrize("at_once", [1 << 24, 256])
def test_costs_are_half_the_squared_error_times_the_squared_gradients_of_each_row(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_NUMBERS_AT_ONCE", at_once)
    model, setting = _llama(), CANDIDATES[0]
    rows = GradientRows(*_rows(), OBJECTIVE, tmp_path / "inputs")
    dense = dict(model.named_modules())[PATH].weight
    costs = measure_costs(_loading(model), {PATH: [setting]}, rows, dtype=None)
    lost = (dense - round_trip(dense, setting)).square()
    total = sum(float((lost * gradient.square()).sum()) for gradient in _gradients(model, PATH))
    assert costs[PATH][setting] == pytest.approx(total / 2 / (4 * 8), rel=1e-4)


def test_projected_costs_are_half_the_squared_product_of_gradient_and_error(tmp_path: Path) -> None:
    model, setting = _llama(), CANDIDATES[0]
    rows = GradientRows(*_rows(), OBJECTIVE, tmp_path / "inputs")
    dense = dict(model.named_modules())[PATH].weight
    costs = projected_costs(_loading(model), {PATH: CANDIDATES}, lambda _, one: pack(dense, one), rows)[PATH]
    lost = dense - round_trip(dense, setting)
    total = sum(float((lost * gradient).sum()) ** 2 for gradient in _gradients(model, PATH))
    assert costs[setting] == pytest.approx(total / 2 / (4 * 8), rel=1e-4)
    assert costs[CANDIDATES[-1]] < 0.1 * costs[CANDIDATES[0]]


def test_fewer_bits_cost_more(tmp_path: Path) -> None:
    model = _llama()
    rows = GradientRows(*_rows(), OBJECTIVE, tmp_path / "inputs")
    costs = measure_costs(_loading(model), _candidates(model), rows, dtype=mx.bfloat16)
    for told in costs.values():
        prices = [told[one] for one in CANDIDATES]
        assert prices == sorted(prices, reverse=True)
        assert prices[-1] >= 0


def test_slopes_are_products_of_gradients_with_rounding_errors_at_the_quantized_model(tmp_path: Path) -> None:
    dense, model = _llama(), _llama()
    layers = dict(model.named_modules())
    for path in _candidates(model):
        layers[path].weight = round_trip(layers[path].weight, CANDIDATES[0])
    rows = GradientRows(*_rows(), OBJECTIVE, tmp_path / "inputs")
    found = error_slopes(_loading(model), _loading(dense), list(_candidates(model)), rows)
    assert set(found) == set(_candidates(model))
    for path, slope in found.items():
        error = layers[path].weight - dict(dense.named_modules())[path].weight
        products = [float((gradient * error).sum()) for gradient in _gradients(model, path)]
        assert slope.value == pytest.approx(sum(products) / (4 * 8), rel=1e-3, abs=1e-6)
        assert slope.error == pytest.approx(stdev(products) * 2 / (4 * 8), rel=1e-3)
    one = GradientRows(*_rows(1), OBJECTIVE, tmp_path / "inputs")
    assert error_slopes(_loading(model), _loading(dense), [PATH], one)[PATH].error == math.inf
