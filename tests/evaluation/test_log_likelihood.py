"""Log-likelihoods are those of each sequence alone, whatever the batch, the padding and the order."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from benchmarks.architecture_configs import VOCAB_SIZE, config_of
from mlxflow.evaluation import log_likelihood
from mlxflow.evaluation.log_likelihood import LogLikelihood, TokenSequence, log_likelihoods
from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.positions import EvaluationRows, hidden_states
from mlxflow.models import model_folder
from tests.small_models import llama


def _sequences(vocab_size: int) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    return [
        TokenSequence(random.integers(0, vocab_size, context).tolist(), random.integers(0, vocab_size, own).tolist())
        for context, own in [(5, 1), (1, 3), (7, 2), (2, 9), (5, 4), (11, 1), (1, 1)]
    ]


def _alone(model: nn.Module, sequence: TokenSequence) -> LogLikelihood:
    """Return the log-likelihood from a forward pass over the sequence by itself, in one piece."""
    ids = mx.array([[*sequence.context, *sequence.completion]])
    logits = model(ids[:, :-1])[0, len(sequence.context) - 1 :].astype(mx.float32)
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(logs, mx.array(list(sequence.completion))[:, None], axis=-1)
    greedy = mx.array_equal(mx.argmax(logits, axis=-1), mx.array(list(sequence.completion)))
    return LogLikelihood(float(own.sum()), len(sequence.completion), bool(greedy))


def _assert_equal(found: Sequence[LogLikelihood], expected: Sequence[LogLikelihood]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.nats == pytest.approx(other.nats, rel=1e-5)
        assert one[1:] == other[1:]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3_moe", "jamba", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_and_padding_change_nothing(architecture: str, batch_size: int) -> None:
    model = model_folder.build(config_of(architecture), seed=0)
    model.eval()
    sequences = _sequences(VOCAB_SIZE)
    expected = [_alone(model, one) for one in sequences]
    _assert_equal(log_likelihoods(model, sequences, batch_size=batch_size), expected)


def test_completions_that_greedy_decoding_writes_are_recognized() -> None:
    model, _ = llama(seed=1)
    model.eval()
    written = [3, 4]
    for _ in range(4):
        written.append(int(mx.argmax(model(mx.array([written]))[0, -1])))
    other = [*written[:-1], (written[-1] + 1) % 50]
    sequences = [TokenSequence(written[:2], written[2:]), TokenSequence(other[:2], other[2:])]
    assert [one.is_greedy for one in log_likelihoods(model, sequences, batch_size=2)] == [True, False]


def test_choices_of_one_token_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llama()
    rows: list[int] = []

    def counted(body: Body, part: EvaluationRows) -> mx.array:
        rows.append(part.tokens.shape[0])
        return hidden_states(body, part)

    monkeypatch.setattr(log_likelihood, "hidden_states", counted)
    sequences = [TokenSequence([1, 2, 3], [choice]) for choice in range(4)] + [TokenSequence([1, 2], [3, 5])]
    found = log_likelihoods(model, sequences, batch_size=8)
    assert rows == [1]
    _assert_equal(found, [_alone(model, one) for one in sequences])


def test_no_sequences_have_no_log_likelihoods() -> None:
    assert log_likelihoods(llama()[0], [], batch_size=4) == []
