from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from benchmarks.architecture_configs import VOCAB_SIZE, config_of
from mlxflow.data.row_widths import lengths_of, width_of
from mlxflow.data.token_file import Rows
from mlxflow.evaluation import positions
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.messages.errors import StageError
from mlxflow.models import model_folder
from mlxflow.ops import document_mask
from tests.small_models import llama
from tests.training.small_training import padded_rows


def _random_state() -> mx.array:
    return mx.array(cast("list[mx.array]", mx.random.state)[0])


class Bigram(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.table = mx.random.normal((11, 11), key=mx.random.key(0))
        self.dropout = nn.Dropout(0.5)

    def __call__(self, ids: mx.array) -> mx.array:
        scores: mx.array = self.dropout(self.table[ids])
        return scores


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_perplexity_weighs_every_target_equally_at_any_batch_size(batch_size: int) -> None:
    table = np.random.default_rng(0).integers(0, 11, (7, 6)).astype(np.uint8)
    model = Bigram()
    is_target = np.random.default_rng(1).random((7, 6)) < 0.8
    measured = measure_perplexity(model, Rows(table, (2 + is_target).astype(np.uint8)), batch_size=batch_size)
    log_probabilities = np.array(nn.log_softmax(model.table, axis=-1))
    losses = -log_probabilities[table[:, :-1], table[:, 1:]][is_target[:, 1:]]
    assert measured.tokens == len(losses) < 35
    assert measured.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert measured.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert measured.standard_error == pytest.approx(
        np.exp(losses.mean()) * losses.std(ddof=1) / np.sqrt(len(losses)), rel=1e-4
    )


def test_measuring_perplexity_keeps_the_mode_and_the_random_state() -> None:
    model = Bigram()
    model.train()
    before = _random_state()
    measure_perplexity(model, Rows(np.zeros((2, 4), np.uint8), np.full((2, 4), 3, np.uint8)), batch_size=2)
    assert model.training
    assert mx.array_equal(_random_state(), before)


def _rows(num_rows: int, context_length: int, vocab_size: int) -> Rows:
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocab_size, (num_rows, context_length + 1)).astype(np.uint16)
    marks = 2 * (1 + (np.arange(context_length + 1) > context_length // 3)) + (random.random(tokens.shape) < 0.7)
    marks[1] = 2  # a row in which nothing counts
    return Rows(tokens, marks.astype(np.uint8))


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    before = mx.set_memory_limit(num_bytes)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


# caps, scales, a bias, a head within the body, tied and not
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "cohere", "granite", "phi", "gpt_neox", "olmoe"])
@pytest.mark.parametrize("masks", [False, True])
def test_the_loss_does_not_depend_on_the_slice_size(architecture: str, masks: bool) -> None:
    model = model_folder.build(config_of(architecture), seed=0)
    if masks and not document_mask.can_mask_documents(model, VOCAB_SIZE):
        pytest.skip("mlx-lm's class takes no mask for each row")
    rows = _rows(5, 12, VOCAB_SIZE)
    tokens, marks = mx.array(rows.tokens), mx.array(rows.marks)
    model.eval()
    logits = document_mask.apply(model, tokens[:, :-1], marks[:, :-1] if masks else None)
    losses = np.array(nn.losses.cross_entropy(logits, tokens[:, 1:]))[rows.marks[:, 1:] & 1 == 1]
    found = []
    for limit in (1, 1 << 20, 1 << 34):  # one position at a time, some of a row, all of them
        with memory_limit(limit):
            found.append(measure_perplexity(model, rows, batch_size=4, masks_documents=masks))
    for one in found:
        assert one.tokens == len(losses)
        assert one.loss == pytest.approx(losses.mean(), rel=1e-6)
        assert one.standard_error == pytest.approx(found[0].standard_error, rel=1e-5)


@pytest.mark.parametrize("masks", [False, True])
def test_padding_after_the_last_target_of_a_pass_is_not_computed(masks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 sums of 96 products differ by less than 96 roundings; the loss of a token has several of them."""
    model, _ = llama(vocab_size=50, context_length=96)
    rows = padded_rows()
    measured = [measure_perplexity(model, one, batch_size=8, masks_documents=masks) for one in (rows, rows.head(8))]
    widths = [width_of(lengths_of(rows.marks[begin : begin + 8]), 96) for begin in range(0, 40, 8)]
    seen: list[int] = []

    def noted(lengths: object, context_length: int) -> int:
        seen.append(width_of(lengths, context_length))  # type: ignore[arg-type]
        return context_length

    monkeypatch.setattr(positions, "width_of", noted)
    whole = [measure_perplexity(model, one, batch_size=8, masks_documents=masks) for one in (rows, rows.head(8))]
    assert seen == [*widths, widths[0]]
    assert min(widths) < 96
    for cut, other in zip(measured, whole, strict=True):
        assert cut.tokens == other.tokens
        assert cut.loss == pytest.approx(other.loss, rel=96 * 2**-24)


def test_rows_without_a_target_are_skipped_and_data_without_any_target_is_refused() -> None:
    rows = _rows(5, 12, 11)
    with_it, without = (measure_perplexity(Bigram(), one, batch_size=5) for one in (rows, _without(rows, 1)))
    assert with_it.tokens == without.tokens
    assert with_it.loss == pytest.approx(without.loss, rel=1e-6)
    nothing = Rows(rows.tokens, rows.marks & 0xFE)
    with pytest.raises(StageError) as caught:
        measure_perplexity(Bigram(), nothing, batch_size=5)
    assert str(caught.value) == "the validation rows hold no token that counts. Raise max_validation_rows."


def _without(rows: Rows, row: int) -> Rows:
    return Rows(np.delete(rows.tokens, row, axis=0), np.delete(rows.marks, row, axis=0))


@pytest.mark.parametrize("limit", [1 << 29, 1 << 28])
def test_memory_for_a_large_vocabulary_stays_within_the_limit(limit: int) -> None:
    vocab_size, context_length, num_rows = 49_152, 512, 2
    model, _ = llama(vocab_size=vocab_size, context_length=context_length)
    rows = _rows(num_rows, context_length, vocab_size)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with memory_limit(limit):
        measure_perplexity(model, rows, batch_size=32)
    taken = mx.get_peak_memory() - before
    assert taken < limit / 8 + limit / 16  # the shares of body and logits
    assert taken < num_rows * context_length * vocab_size * 4 / 2  # all logits in fp32 would take more
