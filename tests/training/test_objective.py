import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxflow.models import model_folder
from mlxflow.training import adapters, objective
from mlxflow.training.objective import distilling_objective, fused_objective, plain_objective
from mlxflow.training.output_head import Head, find_head
from mlxflow.training.settings import AdapterShape
from tests.small_models import llama


def _plain(model: nn.Module, tokens: mx.array, marks: mx.array) -> float:
    total, count = plain_objective(masks_documents=False)(model, tokens, marks)
    return float(total / mx.maximum(count, 1.0))


def test_the_loss_is_that_of_predicting_the_next_token() -> None:
    batch = mx.array([[1, 2, 0], [2, 2, 1]])
    seen = []

    class Model(nn.Module):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            seen.append(ids.tolist())
            return mx.zeros((2, 2, 3))

    loss = _plain(Model(), batch, mx.full((2, 3), 3))
    assert seen == [[[1, 2], [2, 2]]]
    assert loss == pytest.approx(1.0986123)


def test_tokens_that_are_no_targets_do_not_count() -> None:
    tokens = mx.array([[1, 2, 0, 1]])

    class Model(nn.Module):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            return mx.array([[[0.0, 1.0, 2.0], [5.0, 0.0, 0.0], [9.0, 9.0, 0.0]]])

    loss = _plain(Model(), tokens, mx.array([[2, 3, 2, 5]]))
    first, third = math.log(1 + math.e + math.e**2) - 2, math.log(2 + math.exp(-9))
    assert loss == pytest.approx((first + third) / 2, rel=1e-5)
    assert (_plain(Model(), tokens, mx.array([[2, 2, 2, 4]]))) == 0


# --- with the head in it

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
}


def _model(model_type: str = "llama", **changes: Any) -> nn.Module:
    return model_folder.build(SMALL | {"model_type": model_type, "tie_word_embeddings": True} | changes, seed=0)


def _batch() -> tuple[mx.array, mx.array]:
    tokens = mx.random.randint(0, 97, (4, 17), key=mx.random.key(1))
    marks = mx.where(mx.random.uniform(shape=(4, 17), key=mx.random.key(2)) > 0.4, 3, 2)
    return tokens, marks


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_fused_head_and_loss_match_the_loss_and_gradients_of_the_model(model_type: str, tied: bool) -> None:
    model = _model(model_type, tie_word_embeddings=tied)
    head = find_head(model, 97)
    assert head == Head(is_tied=tied)
    fused = fused_objective(head, masks_documents=True, chunk_rows=10)
    plain = plain_objective(masks_documents=True)
    (first, count), one = nn.value_and_grad(model, fused)(model, *_batch())
    (second, other_count), other = nn.value_and_grad(model, plain)(model, *_batch())
    assert float(count) == float(other_count)
    assert float(first) == pytest.approx(float(second), rel=1e-5)
    wanted = dict(tree_flatten(other))
    for name, gradient in tree_flatten(one):
        assert float(mx.abs(gradient - wanted[name]).max() / mx.abs(wanted[name]).max()) < 1e-5, name


def test_a_quantized_head_is_dequantized_and_not_trained() -> None:
    model = _model(hidden_size=64, head_dim=32)
    nn.quantize(model, 32, 8)
    model.freeze()
    head = find_head(model, 97)
    assert head is not None
    assert not head.is_trained(model)
    tokens, marks = _batch()
    fused, _ = fused_objective(head, masks_documents=False, chunk_rows=16)(model, tokens, marks)
    plain, _ = plain_objective(masks_documents=False)(model, tokens, marks)
    assert float(fused) == pytest.approx(float(plain), rel=1e-4)


def test_distillation_has_the_gradient_of_the_divergence_from_the_teacher() -> None:
    (model, _), (teacher, _) = (llama(vocab_size=40, hidden_size=32, num_layers=1, seed=seed) for seed in (0, 1))
    tokens = mx.random.randint(0, 40, (2, 9), key=mx.random.key(0))
    marks = mx.array(np.array([[3] * 9, [3] * 6 + [0] * 3], np.uint8))
    objective = distilling_objective(teacher, masks_documents=False)

    def divergence(weights: Any) -> mx.array:
        model.update(weights)
        ours, theirs = (nn.log_softmax(one(tokens[:, :-1]), axis=-1) for one in (model, teacher))
        each = (mx.exp(theirs) * (theirs - ours)).sum(-1) * (marks[:, 1:] & 1)
        total: mx.array = each.sum()
        return total

    def loss(weights: Any) -> mx.array:
        model.update(weights)
        return objective(model, tokens, marks)[0]

    weights = model.trainable_parameters()
    expected, gradient = (dict(tree_flatten(mx.grad(one)(weights))) for one in (divergence, loss))
    assert all(np.allclose(np.array(gradient[name]), np.array(value), atol=1e-5) for name, value in expected.items())
    assert float(objective(model, tokens, marks)[1]) == 13
    model.update(teacher.parameters())
    at_rest = dict(tree_flatten(mx.grad(loss)(model.trainable_parameters())))
    assert max(float(mx.abs(value).max()) for value in at_rest.values()) < 1e-5


def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the choice of the loss take the default device for a GPU; nothing is computed."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_frozen_head_takes_the_fused_loss_by_itself(
    is_quantized: bool, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab_size = 40_000
    shape = {"model_type": "llama", **SMALL, "tie_word_embeddings": tied, "vocab_size": vocab_size}
    model = model_folder.build(shape, seed=0)
    if is_quantized:
        nn.quantize(model, group_size=32, bits=4)
    head = find_head(model, vocab_size)
    assert head is not None
    adapters.ensure_adapters(model, AdapterShape("lora", 2, 2.0, 0.0, 0, ("self_attn.*",)), seed=0, key="keys")
    _on_a_gpu(monkeypatch)
    most = objective.chunk_rows(vocab_size)
    assert objective._fused_loss_pays(model, head, vocab_size, most + 1)
    assert not objective._fused_loss_pays(model, head, vocab_size, most)
    if not is_quantized:  # a trained head adds up the gradient of its weight
        model.unfreeze()
        assert not objective._fused_loss_pays(model, head, vocab_size, 64)
        assert objective._fused_loss_pays(model, head, vocab_size, 100_000)
