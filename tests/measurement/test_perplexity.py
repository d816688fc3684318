from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.measurement.perplexity import measure_perplexity


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
def test_every_target_weighs_alike_whatever_the_batch_size(batch_size: int) -> None:
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


def test_measuring_leaves_the_mode_and_the_random_state_as_they_were() -> None:
    model = Bigram()
    model.train()
    before = _random_state()
    measure_perplexity(model, Rows(np.zeros((2, 4), np.uint8), np.full((2, 4), 3, np.uint8)), batch_size=2)
    assert model.training
    assert mx.array_equal(_random_state(), before)
