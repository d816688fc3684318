"""Tests of a model's structure read no matrix: their time does not grow with the weights."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlxflow.evaluation.model_body import Body
from mlxflow.ops.copying_products import copying_products
from mlxflow.training.output_head import find_head
from tests.small_models import llama


def test_a_layer_gives_numbers_of_the_same_position() -> None:
    x = mx.arange(6.0).reshape(2, 3)
    linear, head = nn.Linear(3, 5), nn.Embedding(4, 3)
    with copying_products():
        assert linear(x).tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]
        assert head.as_linear(x).tolist() == [[0, 1, 2, 0], [3, 4, 5, 3]]
    assert linear(x).tolist() != [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]


@pytest.mark.parametrize("bits", [0, 4])
def test_embeddings_return_fp32_if_asked_to(bits: int) -> None:
    head = nn.Embedding(4, 32)
    head.weight = head.weight.astype(mx.bfloat16)
    layer = head.to_quantized(group_size=32, bits=bits) if bits else head
    ids = mx.array([1, 3])
    for wide, dtype in ((True, mx.float32), (False, mx.bfloat16)):
        with copying_products(in_fp32=wide):
            assert layer(ids).dtype == dtype
            assert layer.as_linear(layer(ids)).dtype == dtype
    assert layer(ids).dtype == mx.bfloat16


@pytest.mark.parametrize("ask", [lambda model: find_head(model, 64), Body.of], ids=["head", "body"])
@pytest.mark.parametrize("method", ["", "lora", "dora"])
@pytest.mark.parametrize("bits", [0, 4])
def test_questions_about_a_model_read_no_matrix(ask: Callable[[nn.Module], Any], method: str, bits: int) -> None:
    model, _ = llama(vocab_size=64, hidden_size=64, intermediate_size=128, num_heads=2, seed=0)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    if method:
        shape = {"rank": 2, "scale": 1.0, "dropout": 0.0}
        linear_to_lora_layers(model, 2, shape, use_dora=method == "dora")
    model.eval()
    mx.eval(model.parameters())
    weights = dict(tree_flatten(model.parameters()))
    for name in [name for name in weights if _is_of_a_matrix(name, bits)]:
        weights[name] = mx.full(weights[name].shape, mx.nan)
    model.update(tree_unflatten(list(weights.items())))
    assert mx.isnan(model(mx.array([[1, 2]]))).any()
    found = ask(model)
    assert found is not None
    assert getattr(found, "path", "model") == "model"


def _is_of_a_matrix(name: str, bits: int) -> bool:
    """Return whether a parameter is a matrix of a block, the scales of its codes, or of an adapter beside it."""
    of_matrix = ("proj.scales", "linear.scales") if bits else ("proj.weight", "linear.weight")
    return name.startswith("model.layers") and name.endswith((*of_matrix, "lora_a", "lora_b"))
