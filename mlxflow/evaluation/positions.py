"""Batches of token rows for evaluation, their target positions, and the hidden states there."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.slices import rows_at_once


class TokenRows(Protocol):
    """Rows of tokens with their marks, such as `data.token_file.Rows`."""

    @property
    def num_rows(self) -> int:
        """The number of rows, R."""
        ...

    def batch(self, begin: int, end: int) -> tuple[Any, Any]:
        """Return tokens and marks of consecutive rows, (B, L + 1) each."""
        ...


class EvaluationRows(NamedTuple):
    """Rows of one forward pass.

    Attributes:
        tokens: (B, L) ids.
        pieces: (B, L) document marks; None if documents are not kept apart.
        chosen: (N,) the positions with a target, of B * L; None for all of them.
        targets: (N,) the next ids at these positions.
    """

    tokens: mx.array
    pieces: mx.array | None
    chosen: mx.array | None
    targets: mx.array


def parts(rows: TokenRows, *, at_once: int, masks_documents: bool) -> Iterator[EvaluationRows]:
    """Yield rows in their order, leaving out batches without a target.

    Args:
        rows: tokens and marks.
        at_once: rows in a batch, B.
        masks_documents: no token attends to another document in its row.
    """
    for begin in range(0, rows.num_rows, at_once):
        tokens, marks = (np.asarray(one) for one in rows.batch(begin, begin + at_once))
        chosen = np.flatnonzero(marks[:, 1:] & 1)
        if not len(chosen):
            continue
        yield EvaluationRows(
            mx.array(tokens[:, :-1]),
            mx.array(marks[:, :-1]) if masks_documents else None,
            None if len(chosen) == marks[:, 1:].size else mx.array(chosen),
            mx.array(tokens[:, 1:].reshape(-1)[chosen]),
        )


def count_positions(rows: TokenRows) -> int:
    """Return the number of positions with a target."""
    _, marks = rows.batch(0, rows.num_rows)
    return int(np.count_nonzero(np.asarray(marks)[:, 1:] & 1))


def hidden_states(body: Body, part: EvaluationRows) -> mx.array:
    """Return the hidden states at the target positions, (N, D), evaluated."""
    hidden = body.hidden(part.tokens, part.pieces)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if part.chosen is not None:
        hidden = hidden[part.chosen]
    mx.eval(hidden)
    return hidden


def rows_for(model: nn.Module, body: Body, rows: TokenRows, most: int) -> int:
    """Return the number of rows in a forward pass; see `slices.rows_at_once`.

    Args:
        model: the model that is evaluated.
        body: its body.
        rows: tokens and marks.
        most: upper bound.
    """
    tokens = mx.array(np.asarray(rows.batch(0, 1)[0])[:, :-1])
    logits = 0 if body.path is not None else body.hidden(tokens[:, :1], None).shape[-1]  # only the shape is used
    return rows_at_once(model, context_length=tokens.shape[1], most=most, logits=logits)
