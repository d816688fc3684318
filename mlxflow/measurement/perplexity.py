"""How well a model predicts held-out text."""

import math
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxflow.packed import apply


class Perplexity(NamedTuple):
    """Mean loss in nats per token, its exponential, and that one's standard error (delta method)."""

    loss: float
    perplexity: float
    standard_error: float
    tokens: int


def perplexity_of(loss: float) -> float:
    """Return the exponential of a loss in nats; of one that is beyond all measure, a number that still is one."""
    return math.exp(min(loss, 700.0))


class TokenRows(Protocol):
    """Rows of tokens with their marks, such as `data.token_file.Rows`."""

    @property
    def num_rows(self) -> int:
        """The number of rows, R."""
        ...

    def batch(self, begin: int, end: int) -> tuple[Any, Any]:
        """Return tokens and marks of rows that follow one another, (B, L + 1) each."""
        ...


def measure_perplexity(
    model: nn.Module, rows: TokenRows, *, batch_size: int, masks_documents: bool = False
) -> Perplexity:
    """Return the perplexity over rows of tokens, every target weighted alike; draws no random number.

    Args:
        model: maps (B, L) token ids to (B, L, V) logits.
        rows: of tokens and marks.
        batch_size: rows a forward pass.
        masks_documents: no token attends to another document in its row.
    """
    was_training = model.training
    model.eval()
    total, squares, count = 0.0, 0.0, 0
    for begin in range(0, rows.num_rows, batch_size):
        tokens, marks = (mx.array(part) for part in rows.batch(begin, begin + batch_size))
        logits = apply(model, tokens[:, :-1], marks[:, :-1] if masks_documents else None).astype(mx.float32)
        weights = (marks[:, 1:] & 1).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, tokens[:, 1:], weights=weights, reduction="none")
        loss_sum, square_sum, targets = losses.sum(), losses.square().sum(), weights.sum()
        mx.eval(loss_sum, square_sum, targets)
        total, squares = total + loss_sum.item(), squares + square_sum.item()
        count += round(float(targets))
    model.train(was_training)
    mean = total / count
    variance = max(0.0, squares / count - mean * mean) * count / max(1, count - 1)
    perplexity = perplexity_of(mean)
    return Perplexity(mean, perplexity, perplexity * math.sqrt(variance / count), count)
