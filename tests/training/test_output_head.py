"""A head is fused with the loss only where the model's logits are its product, whatever the size of the logits."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from benchmarks.architecture_configs import DENSE, MIXTURES, VOCAB_SIZE, config_of
from mlxflow.models import model_folder
from mlxflow.training.objective import make_objective, plain_objective
from mlxflow.training.output_head import find_head
from tests.small_models import llama

#: Architectures that do more to their logits than one product, or whose head lies elsewhere or has a bias.
NOT_PLAIN = {
    "gemma2", "cohere", "cohere2", "granite", "granitemoe", "minicpm", "phi", "stablelm", "gpt_neox", "gpt2",
    "internlm2",
}  # fmt: skip


def _scaled(model: nn.Module, factor: float) -> nn.Module:
    model.update(tree_map(lambda weight: weight * factor if weight.ndim > 1 else weight, model.parameters()))
    return model


@pytest.mark.parametrize("factor", [1e-3, 1.0])
@pytest.mark.parametrize("architecture", [*DENSE, *MIXTURES])
def test_a_head_is_found_by_structure_not_by_the_size_of_its_logits(architecture: str, factor: float) -> None:
    model = _scaled(model_folder.build(config_of(architecture), seed=0), factor)
    assert (find_head(model, VOCAB_SIZE) is None) == (architecture in NOT_PLAIN)


@pytest.mark.parametrize(
    "architecture", ["gemma2", "cohere", "granite", "minicpm", "gemma3_text", "qwen3", "deepseek_v3"]
)
def test_the_loss_selected_at_small_weights_matches_the_model_at_large_weights(architecture: str) -> None:
    config = config_of(architecture) | {"final_logit_softcapping": 2.0}
    model = _scaled(model_folder.build(config, seed=0), 1e-2)
    chosen = make_objective(model, fused=True, vocab_size=VOCAB_SIZE, masks_documents=False)
    _scaled(model, 1e3)  # as training may leave them: logits far over every cap
    tokens = mx.random.randint(0, VOCAB_SIZE, (2, 17), key=mx.random.key(1))
    marks = mx.full(tokens.shape, 3)
    (loss, _), ours = nn.value_and_grad(model, chosen)(model, tokens, marks)
    (wanted, _), theirs = nn.value_and_grad(model, plain_objective(masks_documents=False))(model, tokens, marks)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    expected = dict(tree_flatten(theirs))
    for name, gradient in tree_flatten(ours):
        size = max(float(mx.abs(expected[name]).max()), 1e-6)
        assert float(mx.abs(gradient - expected[name]).max()) < 1e-4 * size, name


def _minus_infinity(logits: mx.array) -> mx.array:
    logits[..., 3] = -float("inf")
    return logits


#: What a model may do beside the product: (to the hidden states, to the logits).
_Change = Callable[[mx.array], mx.array]
CHANGES: dict[str, tuple[_Change, _Change]] = {
    "a cap far above the logits": (lambda h: h, lambda x: mx.tanh(x / 1e3) * 1e3),
    "a scale near one": (lambda h: h, lambda x: x * 1.01),
    "a bias": (lambda h: h, lambda x: x + 1e-3),
    "a column masked in place": (lambda h: h, _minus_infinity),
    "a limit": (lambda h: h, lambda x: mx.clip(x, -1e3, 1e3)),
    "hidden states scaled": (lambda h: h * 1.001, lambda x: x),
    "hidden states limited": (lambda h: mx.clip(h, -1e6, 1e6), lambda x: x),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_any_change_a_model_makes_to_its_logits_is_detected(change: str, tied: bool) -> None:
    before, after = CHANGES[change]
    model, _ = llama(tie_word_embeddings=tied)
    assert find_head(model, 50) is not None

    def call(self: Any, tokens: mx.array, cache: Any = None) -> mx.array:
        hidden = before(self.model(tokens, cache))
        return after(self.model.embed_tokens.as_linear(hidden) if tied else self.lm_head(hidden))

    model.__class__ = type("Changed", (type(model),), {"__call__": call})
    assert find_head(model, 50) is None


def test_head_detection_leaves_the_model_unchanged() -> None:
    model, _ = llama()
    model.train()
    model.layers[0].eval()
    kinds, modes = [type(one) for one in model.modules()], [one.training for one in model.modules()]
    assert find_head(model, 50) is not None
    assert [type(one) for one in model.modules()] == kinds
    assert [one.training for one in model.modules()] == modes
