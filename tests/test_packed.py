"""Document masks in real architectures, against each document alone."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlxflow.packed import apply, can_mask_documents
from mlxflow.training.objective import plain_objective

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
ROTARY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8.0,
        "sliding_window": 4,
    },
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi3": {"num_key_value_heads": 4},
}


def _model(name: str, **changes: Any) -> nn.Module:
    config = {**SHAPE, "model_type": name, **changes}
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model: nn.Module = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    return model


PIECES = (5, 9, 1, 6)


def _packed() -> tuple[mx.array, mx.array]:
    generator = np.random.default_rng(0)
    tokens = mx.array(generator.integers(0, 97, (2, sum(PIECES))))
    marks = mx.array(np.concatenate([np.full(n, 2 * (i + 1) + 1) for i, n in enumerate(PIECES)]))
    return tokens, mx.broadcast_to(marks, tokens.shape)


@pytest.mark.parametrize("name", ROTARY)
def test_packed_documents_get_the_logits_of_each_alone(name: str) -> None:
    model = _model(name, **ROTARY[name])
    tokens, marks = _packed()
    packed = apply(model, tokens, marks)
    ends = np.cumsum(PIECES).tolist()
    alone = mx.concatenate([model(tokens[:, end - n : end]) for n, end in zip(PIECES, ends, strict=True)], axis=1)
    scale = float(mx.abs(alone).max())
    assert float(mx.abs(packed - alone).max()) < 1e-5 * scale
    assert float(mx.abs(apply(model, tokens, None) - alone).max()) > 0.02 * scale  # without the mask they differ
    assert can_mask_documents(model, 97)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_so_do_the_gradients(name: str) -> None:
    model = _model(name, **ROTARY[name])
    tokens, marks = _packed()
    starts = np.cumsum((0, *PIECES[:-1]))
    marks = mx.array(np.where(np.isin(np.arange(sum(PIECES)), starts), np.array(marks[0]) - 1, np.array(marks[0])))
    marks = mx.broadcast_to(marks, tokens.shape)

    def packed_loss(model: nn.Module) -> mx.array:
        total, count = plain_objective(masks_documents=True)(model, tokens, marks)
        return total / count

    def separate_loss(model: nn.Module) -> mx.array:
        losses = []
        for n, start in zip(PIECES, starts.tolist(), strict=True):
            part = tokens[:, start : start + n]
            losses.append(nn.losses.cross_entropy(model(part[:, :-1]), part[:, 1:]).sum() if n > 1 else mx.array(0.0))
        total: mx.array = sum(losses, mx.array(0.0)) / (2 * sum(n - 1 for n in PIECES))
        return total

    first, one = nn.value_and_grad(model, packed_loss)(model)
    second, other = nn.value_and_grad(model, separate_loss)(model)
    assert float(first) == pytest.approx(float(second), rel=1e-5)
    expected = dict(tree_flatten(other))
    for key, gradient in tree_flatten(one):
        scale = float(mx.abs(expected[key]).max())
        assert float(mx.abs(gradient - expected[key]).max()) < 1e-4 * scale, key


def test_an_architecture_that_counts_positions_through_the_row_is_found_out() -> None:
    gpt2 = _model("gpt2", n_ctx=64, n_embd=32, n_head=4, n_layer=2, n_positions=64, layer_norm_epsilon=1e-5)
    assert not can_mask_documents(gpt2, 97)


def test_a_model_that_takes_no_cache_is_found_out() -> None:
    class Plain(nn.Module):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            return mx.zeros((*ids.shape, 97))

    assert not can_mask_documents(Plain(), 97)
