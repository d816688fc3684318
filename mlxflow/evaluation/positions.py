"""The positions of token rows that count in an evaluation, and their hidden states, some rows at a time."""

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
        """Return tokens and marks of rows that follow one another, (B, L + 1) each."""
        ...


class EvaluationRows(NamedTuple):
    """Rows that go through a model together.

    Attributes:
        tokens: (B, L) ids.
        pieces: (B, L) marks by which documents are kept apart; None where they are not.
        chosen: (N,) the positions that count, of B * L; None for all of them.
        targets: (N,) the ids that come next there.
    """

    tokens: mx.array
    pieces: mx.array | None
    chosen: mx.array | None
    targets: mx.array


def parts(rows: TokenRows, *, at_once: int, masks_documents: bool) -> Iterator[EvaluationRows]:
    """Yield rows in their order, without those in which no position counts.

    Args:
        rows: of tokens and marks.
        at_once: rows of a part, B.
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
    """Return how many positions count."""
    _, marks = rows.batch(0, rows.num_rows)
    return int(np.count_nonzero(np.asarray(marks)[:, 1:] & 1))


def hidden_states(body: Body, part: EvaluationRows) -> mx.array:
    """Return the hidden states of the positions that count, (N, D), computed."""
    hidden = body.hidden(part.tokens, part.pieces)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if part.chosen is not None:
        hidden = hidden[part.chosen]
    mx.eval(hidden)
    return hidden


def rows_for(model: nn.Module, body: Body, rows: TokenRows, most: int) -> int:
    """Return how many rows go through a model at a time; see `slices.rows_at_once`.

    Args:
        model: that evaluates.
        body: of it.
        rows: of tokens and marks.
        most: rows at most.
    """
    tokens = mx.array(np.asarray(rows.batch(0, 1)[0])[:, :-1])
    logits = 0 if body.path is not None else body.hidden(tokens[:, :1], None).shape[-1]  # a shape alone
    return rows_at_once(model, context_length=tokens.shape[1], most=most, logits=logits)
