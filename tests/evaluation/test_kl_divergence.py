import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from benchmarks.architecture_configs import VOCAB_SIZE, config_of
from mlxflow.data.token_file import Rows
from mlxflow.evaluation import kl_divergence
from mlxflow.evaluation.kl_divergence import costs_by_layer, measure_divergence
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.models import model_folder
from tests.small_models import llama

ARCHITECTURES = ["llama", "gemma2", "cohere", "gpt_neox"]


def _rows(num_rows: int = 5, context_length: int = 12, vocab_size: int = VOCAB_SIZE) -> Rows:
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocab_size, (num_rows, context_length + 1)).astype(np.uint16)
    return Rows(tokens, (2 + (random.random(tokens.shape) < 0.7)).astype(np.uint8))


def _pair(architecture: str) -> tuple[nn.Module, nn.Module]:
    """Return a model and one whose weights are a little different."""
    pair = []
    for scale in (0.0, 0.05):
        model = model_folder.build(config_of(architecture), seed=0)
        noise = mx.random.normal((VOCAB_SIZE, 64), key=mx.random.key(2))
        for _, layer in model.named_modules():
            if isinstance(layer, nn.Embedding) and layer.weight.shape == noise.shape:
                layer.weight = layer.weight + scale * noise * mx.abs(layer.weight).mean()
        pair.append(model)
    return pair[0], pair[1]


@contextmanager
def _memory_limit(num_bytes: int) -> Iterator[None]:
    before = mx.set_memory_limit(num_bytes)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


@pytest.mark.parametrize("limit", [1, 1 << 20, 1 << 34])  # one position at a time, some of a row, all of them
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_divergence_does_not_depend_on_the_slice_size(architecture: str, limit: int) -> None:
    dense, other = _pair(architecture)
    rows = _rows()
    with _memory_limit(limit):
        found = measure_divergence(dense, other, rows, batch_size=4, masks_documents=False)
        alone = [measure_perplexity(model, rows, batch_size=4) for model in (dense, other)]
    chosen = rows.marks[:, 1:] & 1 == 1
    logits = [np.array(model(mx.array(rows.tokens[:, :-1])))[chosen].astype(np.float64) for model in (dense, other)]
    logs = [one - np.log(np.exp(one - one.max(-1, keepdims=True)).sum(-1, keepdims=True)) for one in logits]
    logs = [one - one_.max(-1, keepdims=True) for one, one_ in zip(logs, logits, strict=True)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    size = max(np.abs(one).max() for one in logits)
    # a log-probability is off by what the largest logit is rounded by; the divergence's terms are such differences
    rounding = 8 * 2**-23 * size
    assert found.kl == pytest.approx(kl.mean(), abs=rounding)
    assert found.kl_standard_error == pytest.approx(kl.std(ddof=1) / np.sqrt(len(kl)), rel=1e-3, abs=rounding)
    assert found.top1_agreement == pytest.approx((logs[0].argmax(-1) == logs[1].argmax(-1)).mean(), abs=1.5 / len(kl))
    for side, one in zip((found.dense, found.quantized), alone, strict=True):
        assert side.tokens == one.tokens == len(kl)
        assert side.loss == pytest.approx(one.loss, rel=1e-6)


@pytest.mark.parametrize(("tied", "held"), [(True, 1 << 28), (False, 1 << 28), (False, 1)])
def test_a_layers_cost_is_the_divergence_from_changing_only_that_layer(
    tied: bool, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kl_divergence, "HELD_BYTES", held)
    rows = _rows(vocab_size=50)
    dense, _ = llama(tie_word_embeddings=tied)
    paths = ["model.embed_tokens", "model.layers.1.mlp.up_proj", *([] if tied else ["lm_head"])]
    modules = dict(dense.named_modules())
    before = {path: modules[path].weight for path in paths}
    weights = {path: partial(mx.multiply, before[path], 1.2) for path in paths}
    streamed = StreamedModel(lambda: copy.deepcopy(dense))
    costs = costs_by_layer(streamed, weights, rows, batch_size=4, masks_documents=False)
    assert list(costs.values()) == sorted(costs.values(), reverse=True)
    modules = dict(streamed.model.named_modules())
    for path in paths:
        assert mx.array_equal(modules[path].weight, before[path])
        changed, _ = llama(tie_word_embeddings=tied)
        layer = dict(changed.named_modules())[path]
        layer.weight = layer.weight * 1.2
        wanted = measure_divergence(dense, changed, rows, batch_size=4, masks_documents=False).kl
        assert costs[path] == pytest.approx(wanted, rel=1e-4)


def test_memory_for_a_large_vocabulary_stays_within_the_limit() -> None:
    vocab_size, context_length, num_rows, limit = 49_152, 512, 2, 1 << 28
    dense, other = (llama(seed=seed, vocab_size=vocab_size, context_length=context_length)[0] for seed in (0, 1))
    rows = _rows(num_rows, context_length, vocab_size)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with _memory_limit(limit):
        measure_divergence(dense, other, rows, batch_size=32, masks_documents=False)
    taken = mx.get_peak_memory() - before
    assert taken < limit / 8 + limit / 16  # the shares of body and logits
    assert taken < num_rows * context_length * vocab_size * 4 / 2  # the logits of one model in fp32 would take more
