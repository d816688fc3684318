import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxflow.models import model_folder
from mlxflow.ops.gradient_checkpointing import recomputed
from mlxflow.ops.linear_gradients import find_siblings, ordered_lookups, replaced_products
from tests.small_models import llama


def _loss(model: nn.Module) -> mx.array:
    total: mx.array = (model(mx.array([[1, 2, 3, 2, 9], [7, 7, 7, 0, 1]])).astype(mx.float32) ** 2).mean()
    return total


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True}])
def test_linear_gradients_match_mlx_and_layers_are_restored(changes: dict[str, bool]) -> None:
    model = model_folder.build(llama()[1] | changes, seed=0)
    methods = nn.Linear.__call__, nn.Embedding.__call__, nn.Embedding.as_linear
    wanted = dict(tree_flatten(nn.value_and_grad(model, _loss)(model)[1]))
    with replaced_products(), ordered_lookups():
        assert nn.Linear.__call__ is not methods[0]
        value, gradients = nn.value_and_grad(model, _loss)(model)
    found = dict(tree_flatten(gradients))
    assert (nn.Linear.__call__, nn.Embedding.__call__, nn.Embedding.as_linear) == methods
    assert float(value) == pytest.approx(float(_loss(model)), rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert mx.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("every", [0, 1])
def test_gradients_of_concatenated_sibling_layers_match_mlx(every: int) -> None:
    model = model_folder.build(llama()[1] | {"intermediate_size": 48}, seed=0)
    model.train()
    attention = model.model.layers[0].self_attn
    groups = find_siblings(model, mx.array([[1, 2]]))
    assert groups[0] == (attention.q_proj, attention.k_proj, attention.v_proj)
    assert len(groups) == len(model.model.layers), "gate and up are much wider than what they read"
    wanted = dict(tree_flatten(nn.value_and_grad(model, _loss)(model)[1]))
    with recomputed(model, every=every), replaced_products(groups):
        _, gradients = nn.value_and_grad(model, _loss)(model)
    for name, gradient in dict(tree_flatten(gradients)).items():
        assert mx.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-6), name


class _Layers(nn.Module):  # type: ignore[misc]
    """Linear layers that read one array, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 4, bias=False) for _ in range(5)]
        self.biased, self.dropout = nn.Linear(8, 4), nn.Dropout(0.5)

    def __call__(self, x: mx.array) -> mx.array:
        one, two, three, four, five = self.layers
        twice: mx.array = self.dropout(one(x) + two(x)) + three(x + 1) + four(x) + self.biased(x) + five(x) + five(x)
        return twice


def test_siblings_are_plain_layers_called_once_in_sequence() -> None:
    model = _Layers()
    model.layers[2].eval()
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(3)
    assert find_siblings(model, mx.ones((2, 8))) == [(model.layers[0], model.layers[1])]
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected), "dropout used up random numbers"
    assert [layer.training for layer in (model, model.dropout, *model.layers)] == [
        True,
        True,
        True,
        True,
        False,
        True,
        True,
    ]


def test_a_sibling_called_with_another_input_uses_that_input() -> None:
    one, two = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
    x, y = mx.ones((2, 8)), mx.full((2, 8), 2.0)
    wanted = two(y)
    with replaced_products([(one, two)]):
        one(x)
        assert mx.array_equal(two(y), wanted)
        assert mx.array_equal(two(x), wanted / 2)


def test_a_layer_whose_dtype_differs_from_its_input_computes_as_in_mlx() -> None:
    layer, x = nn.Linear(8, 4), mx.ones((2, 8), mx.bfloat16)
    plain = layer(x)
    with replaced_products():
        assert layer(x).dtype == plain.dtype == mx.float32
        assert mx.array_equal(layer(x), plain)
        assert layer(mx.ones(8)).shape == (4,)
