import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxflow import models
from mlxflow.training.products import ordered_lookups, own_products
from tests.small_models import llama


def _loss(model: nn.Module) -> mx.array:
    total: mx.array = (model(mx.array([[1, 2, 3, 2, 9], [7, 7, 7, 0, 1]])).astype(mx.float32) ** 2).mean()
    return total


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True}])
def test_gradients_are_those_of_mlx_and_layers_compute_as_before_afterwards(changes: dict[str, bool]) -> None:
    model = models.build(llama()[1] | changes, seed=0)
    methods = nn.Linear.__call__, nn.Embedding.__call__, nn.Embedding.as_linear
    wanted = dict(tree_flatten(nn.value_and_grad(model, _loss)(model)[1]))
    with own_products(), ordered_lookups():
        assert nn.Linear.__call__ is not methods[0]
        value, gradients = nn.value_and_grad(model, _loss)(model)
    found = dict(tree_flatten(gradients))
    assert (nn.Linear.__call__, nn.Embedding.__call__, nn.Embedding.as_linear) == methods
    assert float(value) == pytest.approx(float(_loss(model)), rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert mx.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6), name


def test_a_layer_of_another_type_than_its_input_computes_as_mlx_has_it() -> None:
    layer, x = nn.Linear(8, 4), mx.ones((2, 8), mx.bfloat16)
    plain = layer(x)
    with own_products():
        assert layer(x).dtype == plain.dtype == mx.float32
        assert mx.array_equal(layer(x), plain)
        assert layer(mx.ones(8)).shape == (4,)
