"""Perplexity of a model on held-out text, in bounded memory.

Rows go through the model's body, and positions through its head, a few at a time: the logits of a batch, or of a whole
row, never exist at once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.positions import EvaluationRows, TokenRows, hidden_states, parts, rows_for
from mlxflow.evaluation.slices import positions_at_once
from mlxflow.messages.errors import StageError
from mlxflow.ops.eval_mode import evaluating
from mlxflow.storage.host_arrays import numpy_of

__all__ = ["Perplexity", "TokenRows", "mean_and_error", "measure_perplexity", "perplexity_from", "perplexity_of"]

# Arrays of logits held at a time: in the model's dtype and in fp32
_ARRAYS = 2


class Perplexity(NamedTuple):
    """Mean loss in nats per token, its exponential, and the standard error of the exponential (delta method)."""

    loss: float
    perplexity: float
    standard_error: float
    tokens: int


def perplexity_of(loss: float) -> float:
    """Return the exponential of a loss in nats; capped at e^700, which is finite."""
    return math.exp(min(loss, 700.0))


def measure_perplexity(
    model: nn.Module, rows: TokenRows, *, batch_size: int, masks_documents: bool = False
) -> Perplexity:
    """Return the perplexity over rows of tokens, with equal weight for every target; draws no random number.

    Memory stays within shares of MLX's limit (see `slices`). The number of rows and positions computed together changes
    the loss by rounding only: in fp32 by less than a millionth of it.

    Args:
        model: maps (B, L) token ids to (B, L, V) logits.
        rows: tokens and marks.
        batch_size: largest number of rows in a forward pass.
        masks_documents: no token attends to another document in its row.

    Raises:
        StageError: the rows have no target.
    """
    losses = part_losses(model, rows, batch_size=batch_size, masks_documents=masks_documents)
    return perplexity_from(np.concatenate([np.empty(0), *losses]))


def part_losses(
    model: nn.Module,
    rows: TokenRows,
    *,
    batch_size: int,
    masks_documents: bool = False,
    is_wanted: Callable[[int], bool] = lambda part: True,
) -> list[NDArray[np.float32]]:
    """Return the losses in nats of the target tokens of each forward pass; see `measure_perplexity`.

    Args:
        model: maps (B, L) token ids to (B, L, V) logits.
        rows: tokens and marks.
        batch_size: largest number of rows in a forward pass.
        masks_documents: no token attends to another document in its row.
        is_wanted: takes the number of a forward pass; a pass that is not wanted reads no rows and has no losses.
    """
    losses: list[NDArray[np.float32]] = []
    with evaluating(model):
        body = Body.of(model)
        at_once = rows_for(body, rows, batch_size)
        for number, begin in enumerate(range(0, rows.num_rows, at_once)):
            if is_wanted(number):
                found = parts(_Window(rows, begin, at_once), at_once=at_once, masks_documents=masks_documents)
                losses.append(np.concatenate([np.empty(0, np.float32), *(_losses(body, part) for part in found)]))
    return losses


class _Window(NamedTuple):
    """Some consecutive rows as rows of their own."""

    rows: TokenRows
    first: int
    num_rows: int

    def batch(self, begin: int, end: int) -> tuple[Any, Any]:
        return self.rows.batch(self.first + begin, self.first + end)


def _losses(body: Body, part: EvaluationRows) -> NDArray[np.float32]:
    """Return the losses at the target positions of a forward pass, for some positions at a time."""
    hidden = hidden_states(body, part)
    step = positions_of_a_slice(body, hidden)
    losses = []
    for begin in range(0, len(hidden), step):
        losses.append(numpy_of(token_losses(body, hidden[begin : begin + step], part.targets[begin : begin + step])))
    return np.concatenate(losses)


def positions_of_a_slice(body: Body, hidden: mx.array) -> int:
    """Return the number of positions whose logits are held at a time.

    Args:
        body: of the model.
        hidden: its hidden states, (N, D).
    """
    return positions_at_once(body.logits(hidden[:1]).shape[-1], arrays=_ARRAYS)


def token_losses(body: Body, hidden: mx.array, targets: mx.array) -> mx.array:
    """Return the losses in nats, (N,), of hidden states, (N, D), all at once.

    Args:
        body: of the model.
        hidden: at the positions.
        targets: (N,) the next ids at these positions.
    """
    losses: mx.array = nn.losses.cross_entropy(body.logits(hidden).astype(mx.float32), targets, reduction="none")
    return losses


def perplexity_from(losses: NDArray[np.float64]) -> Perplexity:
    """Return the perplexity of losses in nats, (N,).

    Raises:
        StageError: there are no losses.
    """
    if not len(losses):
        raise StageError("the validation rows hold no token that counts. Raise max_validation_rows.")
    mean, error = mean_and_error(losses)
    perplexity = perplexity_of(mean)
    return Perplexity(mean, perplexity, perplexity * error, len(losses))


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean of values, (N,), and its standard error."""
    return float(values.mean()), float(values.std(ddof=min(1, len(values) - 1)) / math.sqrt(len(values)))
