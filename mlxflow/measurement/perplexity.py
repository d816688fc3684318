"""How well a model predicts held-out text."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Perplexity(NamedTuple):
    """Mean loss in nats per token, its exponential, and that one's standard error (delta method)."""

    loss: float
    perplexity: float
    standard_error: float
    tokens: int


def measure_perplexity(model: nn.Module, table: "NDArray[Any]", *, batch_size: int) -> Perplexity:
    """Return the perplexity over rows of tokens, every target weighted alike; draws no random number.

    Args:
        model: maps (B, L) token ids to (B, L, V) logits.
        table: (R, L + 1) rows of token ids.
        batch_size: rows a forward pass.
    """
    was_training = model.training
    model.eval()
    total, squares, count = 0.0, 0.0, 0
    for begin in range(0, len(table), batch_size):
        batch = mx.array(table[begin : begin + batch_size])
        logits = model(batch[:, :-1]).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, batch[:, 1:], reduction="none")
        loss_sum, square_sum = losses.sum(), losses.square().sum()
        mx.eval(loss_sum, square_sum)
        total, squares, count = total + loss_sum.item(), squares + square_sum.item(), count + losses.size
    model.train(was_training)
    mean = total / count
    variance = max(0.0, squares / count - mean * mean) * count / max(1, count - 1)
    perplexity = math.exp(min(mean, 700.0))
    return Perplexity(mean, perplexity, perplexity * math.sqrt(variance / count), count)
