"""The cut between hidden states and logits is found by what a model computes, in every architecture."""

import gc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from benchmarks.architecture_configs import DENSE, MIXTURES, VOCAB_SIZE, config_of
from mlxflow.evaluation.model_body import Body
from mlxflow.models import model_folder
from mlxflow.ops import attention_overrides, blockwise_attention, query_blocks
from tests.small_models import llama

MARKS = mx.array([[2] * 4 + [4] * 7] * 3)


@pytest.mark.parametrize("architecture", [*DENSE, *MIXTURES])
def test_sliced_logits_match_the_models_logits(architecture: str) -> None:
    model = model_folder.build(config_of(architecture), seed=0)
    model.eval()
    body = Body.of(model)
    assert body.path == {"gpt_neox": "model.final_layer_norm"}.get(architecture, body.path or "a body")
    tokens = mx.random.randint(0, VOCAB_SIZE, (3, 11), key=mx.random.key(1))
    wanted = model(tokens).reshape(-1, VOCAB_SIZE)
    hidden = body.hidden(tokens, None).reshape(len(wanted), -1)
    parts = mx.concatenate([body.logits(hidden[begin : begin + 5]) for begin in range(0, len(hidden), 5)])
    # products of 64 numbers in fp32, in another order
    assert mx.allclose(parts, wanted, rtol=1e-5, atol=64 * 2**-24 * float(mx.abs(wanted).max()))


def test_body_detection_leaves_the_model_unchanged_and_keeps_no_arrays() -> None:
    model, _ = llama()
    model.eval()
    kinds = [type(one) for one in model.modules()]
    tokens = mx.arange(8)[None]
    mx.eval(tokens)
    gc.collect()  # models of other tests
    before = mx.get_active_memory()
    body = Body.of(model)
    mx.eval(body.logits(body.hidden(tokens, None)[0]))
    assert [type(one) for one in model.modules()] == kinds
    assert mx.get_active_memory() == before


class _Wrapped(nn.Module):  # type: ignore[misc]
    """A model around a language model, as those for pictures and text are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.language_model = inner

    @property
    def layers(self) -> Any:
        return self.language_model.layers

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits: mx.array = self.language_model(tokens, cache)
        return logits


def test_a_nested_body_is_found() -> None:
    model = _Wrapped(llama()[0])
    model.eval()
    assert Body.of(model).path == "language_model.model"


class _Changed(_Wrapped):
    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        logits: mx.array = self.language_model(tokens, cache)
        return self.change(tokens, logits)

    def change(self, tokens: mx.array, logits: mx.array) -> mx.array:
        return logits - logits.mean(axis=1, keepdims=True)


class _Copying(_Changed):
    def change(self, tokens: mx.array, logits: mx.array) -> mx.array:
        return logits + tokens[..., None]


@pytest.mark.parametrize("kind", [_Changed, _Copying])
def test_models_whose_logits_need_other_positions_are_not_sliced(kind: type[_Changed]) -> None:
    model = kind(llama()[0])
    model.eval()
    body = Body.of(model)
    assert body.path is None
    tokens = mx.arange(8)[None]
    logits = body.hidden(tokens, None)
    assert mx.array_equal(logits, model(tokens))
    assert mx.array_equal(body.logits(logits[0]), logits[0])


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU has other attention")
def test_attention_of_long_rows_is_computed_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llama(vocab_size=50, context_length=40, num_layers=2)
    model.eval()
    tokens = mx.random.randint(0, 50, (2, 40), key=mx.random.key(0))
    marks = mx.where(mx.arange(40) < 17, 3, 5)[None] * mx.ones((2, 1), mx.int32)
    body = Body.of(model)
    called: list[bool] = []
    plain = blockwise_attention.causal_attention

    def noted(*arrays: mx.array, **named: Any) -> mx.array:
        called.append(named["first"] is not None)
        return plain(*arrays, **named)

    monkeypatch.setattr(attention_overrides, "causal_attention", noted)
    for given in (None, marks):
        whole = body.hidden(tokens, given)
        assert not called
        with monkeypatch.context() as patch:
            patch.setattr(query_blocks, "_MOST_AT_ONCE", 0)
            divided = body.hidden(tokens, given)
        assert called == [given is not None] * 2
        called.clear()
        assert mx.allclose(whole, divided, atol=1e-4)
