"""Document masks in real architectures, against each document alone."""

from collections import Counter
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlxflow.kernels.attention import reference
from mlxflow.ops.attention_overrides import Causal, Heads, first_causal_heads, in_fixed_order
from mlxflow.ops.document_mask import _PackedRows, apply, can_mask_documents, has_row_state, noted_bounds
from mlxflow.ops.gradient_checkpointing import recomputed
from mlxflow.training.objective import plain_objective
from tests.small_models import llama

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
def test_packed_documents_have_the_logits_of_separate_documents(name: str) -> None:
    model = _model(name, **ROTARY[name])
    tokens, marks = _packed()
    packed = apply(model, tokens, marks)
    ends = np.cumsum(PIECES).tolist()
    alone = mx.concatenate([model(tokens[:, end - n : end]) for n, end in zip(PIECES, ends, strict=True)], axis=1)
    scale = float(mx.abs(alone).max())
    assert float(mx.abs(packed - alone).max()) < 1e-5 * scale
    assert float(mx.abs(apply(model, tokens, None) - alone).max()) > 0.02 * scale  # without the mask they differ
    assert can_mask_documents(model, 97)
    assert not has_row_state(model)


@pytest.mark.parametrize("num_rows", [2, 3])  # as many as there are heads of keys, and another number
@pytest.mark.parametrize("name", ROTARY)
def test_each_row_is_masked_by_its_own_documents(name: str, num_rows: int) -> None:
    model = _model(name, **ROTARY[name])
    tokens = mx.array(np.random.default_rng(0).integers(0, 97, (num_rows, 12)))
    ends = (4, 9, 6)[:num_rows]
    marks = mx.array([[2] * end + [4] * (12 - end) for end in ends])
    packed = apply(model, tokens, marks)
    for row, end in enumerate(ends):
        one = tokens[row : row + 1]
        alone = mx.concatenate([model(one[:, :end]), model(one[:, end:])], axis=1)
        assert float(mx.abs(packed[row : row + 1] - alone).max()) < 1e-5 * float(mx.abs(alone).max())


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_packed_documents_have_the_gradients_of_separate_documents(name: str) -> None:
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


class Asked(NamedTuple):
    """What stands in for a kernel, and how often it was asked with first keys and without."""

    kernel: Causal
    times: Counter[str]


def _asked() -> Asked:
    times: Counter[str] = Counter()

    def kernel(q: mx.array, k: mx.array, v: mx.array, scale: float, first: mx.array | None) -> mx.array:
        times["causal" if first is None else "bounded"] += 1
        return reference(q, k, v, scale, first)[0]

    return Asked(kernel, times)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("name", sorted(ROTARY.keys() - {"gemma2"}))
def test_the_attention_kernel_gets_the_first_key_of_each_query(name: str, is_packed: bool, every: int) -> None:
    model = _model(name, **ROTARY[name])
    model.set_dtype(mx.bfloat16)
    tokens, marks = _packed()
    has_window = name == "gemma3_text"  # in every second layer, from the first on

    def loss(model: nn.Module) -> mx.array:
        return apply(model, tokens, marks if is_packed else None).astype(mx.float32).square().mean()

    asked = _asked()
    with recomputed(model, every=every):
        plain, gradients = nn.value_and_grad(model, loss)(model)
        with in_fixed_order(asked.kernel):
            ours, ours_gradients = nn.value_and_grad(model, loss)(model)
        heads = first_causal_heads(model, context_length=tokens.shape[1], masks_documents=is_packed)
    assert heads == Heads(8, is_bounded=is_packed or has_window)
    passes = 1 + (every == 1)  # a recomputed layer asks again
    bounded = 3 if is_packed else 2 * has_window
    assert asked.times == +Counter({"bounded": bounded * passes, "causal": (3 - bounded) * passes})
    assert float(ours) == pytest.approx(float(plain), rel=1e-2)
    expected = dict(tree_flatten(gradients))
    for key, gradient in tree_flatten(ours_gradients):
        scale = float(mx.abs(expected[key]).max())
        assert float(mx.abs(gradient - expected[key]).max()) < 0.1 * scale, key


def test_a_modified_mask_has_no_known_bounds() -> None:
    model = _model("gemma2", **ROTARY["gemma2"])  # has an attention of its own
    asked = _asked()
    tokens, marks = _packed()
    with in_fixed_order(asked.kernel):
        apply(model, tokens, marks)
    assert not asked.times
    with noted_bounds() as bounds:
        mask = _PackedRows(marks).make_mask(tokens.shape[1])
        known = bounds.of(mask)
        assert known is not None
        assert known[0].tolist() == [0] * 5 + [5] * 9 + [14] + [15] * 6
        assert bounds.of(mask & mask) is None
        window = _PackedRows(marks).make_mask(tokens.shape[1], window_size=4)
        sees = np.array(window)[0, 0]
        assert np.array(bounds.of(window))[0].tolist() == sees.argmax(axis=1).tolist()
    assert bounds.of(_PackedRows(marks).make_mask(tokens.shape[1])) is None, "the block has ended"


def test_an_architecture_with_absolute_positions_cannot_mask_documents() -> None:
    gpt2 = _model("gpt2", n_ctx=64, n_embd=32, n_head=4, n_layer=2, n_positions=64, layer_norm_epsilon=1e-5)
    assert not can_mask_documents(gpt2, 97)
    assert has_row_state(gpt2)


def test_recurrent_layers_cannot_mask_documents() -> None:
    shape = {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}
    mamba = _model("mamba", **shape)
    assert not can_mask_documents(mamba, 97)
    assert has_row_state(mamba)


def test_rounding_in_16_bits_does_not_count_as_another_position() -> None:
    """Pretrained models have large activations: in bf16 the logits of SmolLM2-135M differed by two thirds."""
    model, _ = llama(vocab_size=97, hidden_size=64, num_layers=4, seed=0)
    for layer in model.layers:
        layer.self_attn.q_proj.weight *= 30
        layer.mlp.down_proj.weight *= 5
    model.set_dtype(mx.bfloat16)
    assert can_mask_documents(model, 97)
    for name, value in tree_flatten(model.parameters()):
        assert value.dtype == mx.bfloat16, name


def test_a_model_without_a_cache_argument_cannot_mask_documents() -> None:
    class Plain(nn.Module):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            return mx.zeros((*ids.shape, 97))

    assert not can_mask_documents(Plain(), 97)
