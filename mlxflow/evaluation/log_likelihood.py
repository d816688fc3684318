"""Log-likelihoods of completions after their contexts, in batches and in bounded memory.

Rows are padded on the right, where a causal model's earlier positions do not see them. Completions whose forward pass
reads the same ids, such as the choices of one token each after the same prompt, share a row. The number of rows and
positions computed together changes a sum by rounding only: in fp32 by less than 1e-5 of it.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.positions import EvaluationRows, hidden_states
from mlxflow.evaluation.slices import positions_at_once, rows_at_once
from mlxflow.ops.eval_mode import evaluating
from mlxflow.storage.host_arrays import numpy_of

# Arrays of logits held at a time: in the model's dtype, in fp32, and one of their size
_ARRAYS = 3


class TokenSequence(NamedTuple):
    """A context and its completion.

    Attributes:
        context: ids, at least one.
        completion: ids, at least one.
    """

    context: Sequence[int]
    completion: Sequence[int]

    @property
    def read(self) -> tuple[int, ...]:
        """The ids that a forward pass reads: all but the last."""
        return (*self.context, *self.completion[:-1])


class LogLikelihood(NamedTuple):
    """The log-likelihood of a completion.

    Attributes:
        nats: sum over its tokens.
        tokens: their number.
        is_greedy: whether each of them is the likeliest one, so that greedy decoding writes the completion.
    """

    nats: float
    tokens: int
    is_greedy: bool


class _Row(NamedTuple):
    """A row of a forward pass.

    Attributes:
        read: its ids.
        sequences: numbers of the sequences that read them; all have contexts of the same length or longer.
    """

    read: tuple[int, ...]
    sequences: list[int]


def log_likelihoods(model: nn.Module, sequences: Sequence[TokenSequence], *, batch_size: int) -> list[LogLikelihood]:
    """Return the log-likelihood of each completion; draws no random number.

    Args:
        model: maps (B, L) token ids to (B, L, V) logits; each position depends on earlier ones only.
        sequences: contexts and completions.
        batch_size: largest number of rows in a forward pass.
    """
    by_read: dict[tuple[int, ...], list[int]] = {}
    for number, sequence in enumerate(sequences):
        by_read.setdefault(sequence.read, []).append(number)
    rows = sorted((_Row(read, numbers) for read, numbers in by_read.items()), key=lambda row: -len(row.read))
    found: dict[int, LogLikelihood] = {}
    with evaluating(model):
        body = Body.of(model)
        for batch in _batches(rows, model, body, batch_size):
            found.update(_measure(body, batch, sequences))
    return [found[number] for number in range(len(sequences))]


def _batches(rows: Sequence[_Row], model: nn.Module, body: Body, batch_size: int) -> Iterator[Sequence[_Row]]:
    """Yield rows that are computed together, the longest first, so that little of a batch is padding."""
    begin, logits = 0, 0
    if rows and body.path is None:
        logits = body.hidden(mx.array([rows[0].read[:1]]), None).shape[-1]  # only the shape is used
    while begin < len(rows):
        length = len(rows[begin].read)
        count = rows_at_once(model, context_length=length, most=batch_size, logits=logits)
        yield rows[begin : begin + count]
        begin += count


def _measure(
    body: Body, rows: Sequence[_Row], sequences: Sequence[TokenSequence]
) -> Iterator[tuple[int, LogLikelihood]]:
    """Yield the number and the log-likelihood of each sequence of a batch."""
    length = len(rows[0].read)
    tokens = np.zeros((len(rows), length), np.int32)
    chosen: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        tokens[index, : len(row.read)] = row.read
        for number in row.sequences:
            first = index * length + len(sequences[number].context) - 1
            chosen += range(first, first + len(sequences[number].completion))
            targets += sequences[number].completion
    part = EvaluationRows(mx.array(tokens), None, mx.array(chosen), mx.array(targets))
    nats, hits = _at_targets(body, part)
    begin = 0
    for row in rows:
        for number in row.sequences:
            end = begin + len(sequences[number].completion)
            total = math.fsum(nats[begin:end].tolist())
            yield number, LogLikelihood(total, end - begin, bool(hits[begin:end].all()))
            begin = end


def _at_targets(body: Body, part: EvaluationRows) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the log-likelihood in nats of each target, and whether it is the likeliest token, (N,) each."""
    hidden = hidden_states(body, part)
    step = positions_at_once(body.logits(hidden[:1]).shape[-1], arrays=_ARRAYS)
    nats, hits = [], []
    for begin in range(0, len(hidden), step):
        targets = part.targets[begin : begin + step]
        logits = body.logits(hidden[begin : begin + step]).astype(mx.float32)
        nats.append(numpy_of(-nn.losses.cross_entropy(logits, targets, reduction="none")))
        hits.append(numpy_of(mx.argmax(logits, axis=-1) == targets))
    return np.concatenate(nats), np.concatenate(hits)
