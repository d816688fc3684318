"""Batches of token rows for evaluation, their target positions, and the hidden states there."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxflow.data.row_widths import lengths_of, width_of
from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.slices import rows_at_once

#: Largest hidden states that are held at a time of a streamed model, whose blocks are read once for all of them
HELD_BYTES = 256 << 20


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
        tokens: (B, L) ids; L is less than the context length where no row has a later target.
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
    for tokens, marks, pieces in _batches(rows, at_once=at_once, masks_documents=masks_documents, cuts=True):
        chosen = np.flatnonzero(marks[:, 1:] & 1)
        if not len(chosen):
            continue
        yield EvaluationRows(
            mx.array(tokens[:, :-1]),
            pieces,
            None if len(chosen) == marks[:, 1:].size else mx.array(chosen),
            mx.array(tokens[:, 1:].reshape(-1)[chosen]),
        )


def all_positions(rows: TokenRows, *, at_once: int, masks_documents: bool) -> Iterator[EvaluationRows]:
    """Yield rows in their order, with every position as a target, whatever its mark.

    Args:
        rows: tokens and marks.
        at_once: rows in a batch, B.
        masks_documents: no token attends to another document in its row.
    """
    for tokens, _, pieces in _batches(rows, at_once=at_once, masks_documents=masks_documents, cuts=False):
        ids = mx.array(tokens.astype(np.int32))
        yield EvaluationRows(ids[:, :-1], pieces, None, ids[:, 1:].reshape(-1))


def _batches(
    rows: TokenRows, *, at_once: int, masks_documents: bool, cuts: bool
) -> Iterator[tuple[NDArray[Any], NDArray[Any], mx.array | None]]:
    """Yield tokens and marks of consecutive rows, (B, L + 1) each, and the document marks, (B, L), if they count.

    Args:
        rows: tokens and marks.
        at_once: rows in a batch, B.
        masks_documents: no token attends to another document in its row.
        cuts: leave out the positions after the last target of the batch; see `row_widths`.
    """
    for begin in range(0, rows.num_rows, at_once):
        tokens, marks = (np.asarray(one) for one in rows.batch(begin, begin + at_once))
        if cuts:
            width = width_of(lengths_of(marks), marks.shape[1] - 1)
            tokens, marks = tokens[:, : width + 1], marks[:, : width + 1]
        yield tokens, marks, mx.array(marks[:, :-1]) if masks_documents else None


def count_positions(rows: TokenRows) -> int:
    """Return the number of positions with a target."""
    _, marks = rows.batch(0, rows.num_rows)
    return int(np.count_nonzero(np.asarray(marks)[:, 1:] & 1))


def hidden_states(body: Body, part: EvaluationRows) -> mx.array:
    """Return the hidden states at the target positions, (N, D), evaluated."""
    return hidden_states_of(body, [part])[0]


def hidden_states_of(body: Body, some: Sequence[EvaluationRows]) -> list[mx.array]:
    """Return the hidden states at the target positions of several forward passes, (N, D) each, evaluated.

    A streamed model reads each block once for all of them.
    """
    with body.passes() as evaluate:
        states = [at_targets(body.hidden(part.tokens, part.pieces), part) for part in some]
        evaluate()
    for hidden in states:
        mx.eval(hidden)
    return states


def at_targets(hidden: mx.array, part: EvaluationRows) -> mx.array:
    """Return hidden states, (B, L, D), at the target positions of their rows, (N, D)."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden if part.chosen is None else hidden[part.chosen]


def grouped(bodies: Sequence[Body], found: Iterable[EvaluationRows]) -> Iterator[list[EvaluationRows]]:
    """Yield rows of forward passes that are computed together: single ones, unless a model is streamed.

    Args:
        bodies: of the models that compute them.
        found: rows in their order.
    """
    if all(body.streamed is None for body in bodies):
        yield from ([part] for part in found)
        return
    group: list[EvaluationRows] = []
    held = 0
    for part in found:
        size = part.tokens.size * _bytes_of_a_state(bodies[0], part.tokens)
        if group and held + size > HELD_BYTES:
            yield group
            group, held = [], 0
        group.append(part)
        held += size
    if group:
        yield group


def _bytes_of_a_state(body: Body, tokens: mx.array) -> int:
    hidden = body.hidden(tokens[:1, :1], None)  # not evaluated, and not kept: its graph would keep all weights
    return hidden.shape[-1] * hidden.dtype.size


def rows_for(body: Body, rows: TokenRows, most: int) -> int:
    """Return the number of rows in a forward pass; see `slices.rows_at_once`.

    Args:
        body: of the model that is evaluated.
        rows: tokens and marks.
        most: upper bound.
    """
    tokens = mx.array(np.asarray(rows.batch(0, 1)[0])[:, :-1])
    logits = 0 if body.path is not None else body.hidden(tokens[:, :1], None).shape[-1]  # only the shape is used
    return rows_at_once(body.model, context_length=tokens.shape[1], most=most, logits=logits)
