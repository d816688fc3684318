"""How far a quantized model's predictions are from those of the dense one."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.measurement.perplexity import Perplexity, TokenRows, perplexity_of
from mlxflow.packed import apply


class Divergence(NamedTuple):
    """Two models on the same tokens.

    Attributes:
        dense: perplexity of the first.
        quantized: perplexity of the second.
        kl: mean over the tokens of the Kullback-Leibler divergence from the dense model's distribution, in nats.
        kl_standard_error: of that mean.
        top1_agreement: share of tokens at which both hold the same next one for the likeliest.
    """

    dense: Perplexity
    quantized: Perplexity
    kl: float
    kl_standard_error: float
    top1_agreement: float

    @property
    def perplexity_increase(self) -> float:
        """Relative to the dense model's."""
        return self.quantized.perplexity / self.dense.perplexity - 1


def measure_divergence(
    dense: nn.Module, quantized: nn.Module, rows: TokenRows, *, batch_size: int, masks_documents: bool
) -> Divergence:
    """Compare two models over rows of tokens, every target weighted alike; draws no random number.

    Args:
        dense: maps (B, L) token ids to (B, L, V) logits.
        quantized: likewise.
        rows: of tokens and marks.
        batch_size: rows a forward pass.
        masks_documents: no token attends to another document in its row.
    """
    for model in (dense, quantized):
        model.eval()
    sums = [0.0] * 8
    for begin in range(0, rows.num_rows, batch_size):
        tokens, marks = (mx.array(part) for part in rows.batch(begin, begin + batch_size))
        pieces = marks[:, :-1] if masks_documents else None
        logits = [apply(model, tokens[:, :-1], pieces).astype(mx.float32) for model in (dense, quantized)]
        found = _sums(logits[0], logits[1], tokens[:, 1:], (marks[:, 1:] & 1).astype(mx.float32))
        mx.eval(found)
        sums = [total + float(one) for total, one in zip(sums, found, strict=True)]
    loss, loss_squares, other, other_squares, kl, kl_squares, same, count = sums
    return Divergence(
        _perplexity(loss, loss_squares, count),
        _perplexity(other, other_squares, count),
        max(0.0, kl / count),
        _standard_error(kl, kl_squares, count),
        same / count,
    )


def costs_by_layer(
    dense: nn.Module,
    weights: Mapping[str, Callable[[], mx.array]],
    rows: TokenRows,
    *,
    batch_size: int,
    masks_documents: bool,
) -> dict[str, float]:
    """Return the divergence in nats per token that each layer's quantized weight causes alone, the largest first.

    Args:
        dense: as it is; put back afterwards.
        weights: by module path, what gives the weight that a quantized layer computes with.
        rows: of tokens and marks.
        batch_size: rows a forward pass.
        masks_documents: no token attends to another document in its row.
    """
    modules = dict(dense.named_modules())
    costs = {}
    for path, weight in weights.items():
        kept = modules[path]["weight"]
        quantized = weight()
        total, count = 0.0, 0.0
        for begin in range(0, rows.num_rows, batch_size):
            tokens, marks = (mx.array(part) for part in rows.batch(begin, begin + batch_size))
            pieces = marks[:, :-1] if masks_documents else None
            exact = apply(dense, tokens[:, :-1], pieces).astype(mx.float32)
            modules[path]["weight"] = quantized
            rounded = apply(dense, tokens[:, :-1], pieces).astype(mx.float32)
            modules[path]["weight"] = kept
            found = _sums(exact, rounded, tokens[:, 1:], (marks[:, 1:] & 1).astype(mx.float32))
            total, count = total + float(found[4]), count + float(found[7])
        costs[path] = max(0.0, total / max(1.0, count))
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


@mx.compile
def _sums(exact: mx.array, rounded: mx.array, targets: mx.array, weights: mx.array) -> list[mx.array]:
    """Return weighted sums: both losses and their squares, divergence and its squares, agreements, tokens."""
    logs = [logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (exact, rounded)]
    losses = [-mx.take_along_axis(log, targets[..., None], axis=-1).squeeze(-1) for log in logs]
    kl = (mx.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1)
    same = exact.argmax(axis=-1) == rounded.argmax(axis=-1)
    values = [losses[0], losses[0].square(), losses[1], losses[1].square(), kl, kl.square(), same]
    return [(value * weights).sum() for value in values] + [weights.sum()]


def _standard_error(total: float, squares: float, count: float) -> float:
    mean = total / count
    variance = max(0.0, squares / count - mean * mean) * count / max(1.0, count - 1)
    return math.sqrt(variance / count)


def _perplexity(loss: float, squares: float, count: float) -> Perplexity:
    mean = loss / count
    perplexity = perplexity_of(mean)
    return Perplexity(mean, perplexity, perplexity * _standard_error(loss, squares, count), round(count))
