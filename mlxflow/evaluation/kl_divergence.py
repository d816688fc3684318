"""Kullback-Leibler divergence of a quantized model from the dense one, for the whole model or for each layer.

Both models' logits are needed at the same positions, a slice at a time; `dense_reference` caches the dense side for
several quantized models.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxflow.evaluation.dense_reference import Reference
from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.perplexity import Perplexity, mean_and_error, perplexity_from
from mlxflow.evaluation.positions import (
    HELD_BYTES,
    EvaluationRows,
    TokenRows,
    at_targets,
    grouped,
    hidden_states_of,
    parts,
    rows_for,
)
from mlxflow.evaluation.slices import positions_at_once
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.storage.host_arrays import numpy_of

# Arrays of logits held at a time: both models', in their dtype and in fp32, and intermediate results
_ARRAYS = 6


class Divergence(NamedTuple):
    """A dense and a quantized model compared on the same tokens.

    Attributes:
        dense: perplexity of the dense model.
        quantized: perplexity of the quantized model.
        kl: Kullback-Leibler divergence of the quantized from the dense model's distribution, mean over the tokens, in
            nats.
        kl_standard_error: of that mean.
        top1_agreement: share of positions at which both models rank the same token first.
    """

    dense: Perplexity
    quantized: Perplexity
    kl: float
    kl_standard_error: float
    top1_agreement: float

    @property
    def perplexity_increase(self) -> float:
        """The quantized model's perplexity over the dense one's, minus 1."""
        return self.quantized.perplexity / self.dense.perplexity - 1


def measure_divergence(
    dense: nn.Module | Reference,
    quantized: nn.Module | StreamedModel,
    rows: TokenRows,
    *,
    batch_size: int,
    masks_documents: bool,
) -> Divergence:
    """Compare two models over rows of tokens, with equal weight for every target; draws no random number.

    Memory and rounding are as described at `perplexity.measure_perplexity`.

    Args:
        dense: maps (B, L) token ids to (B, L, V) logits; or the cached reference of such a model on the same rows.
        quantized: maps (B, L) token ids to (B, L, V) logits.
        rows: tokens and marks.
        batch_size: largest number of rows in a forward pass.
        masks_documents: no token attends to another document in its row.

    Raises:
        StageError: the rows have no target.
    """
    losses, other, kl, same = compare_positions(
        dense, quantized, rows, batch_size=batch_size, masks_documents=masks_documents
    )
    dense_side = perplexity_from(losses)
    mean, error = mean_and_error(kl)
    not_negative = float(np.maximum(0.0, mean))  # rounding may give less; a NaN stays one
    return Divergence(dense_side, perplexity_from(other), not_negative, error, float(same.mean()))


def compare_positions(
    dense: nn.Module | Reference,
    quantized: nn.Module | StreamedModel,
    rows: TokenRows,
    *,
    batch_size: int,
    masks_documents: bool,
) -> NDArray[np.float64]:
    """Return for each target, in the order of the rows, what two models give, (4, N).

    Both losses in nats, the divergence in nats, and 1 if both rank the same token first, else 0.

    Args:
        dense: see `measure_divergence`.
        quantized: see `measure_divergence`.
        rows: tokens and marks.
        batch_size: largest number of rows in a forward pass.
        masks_documents: no token attends to another document in its row.
    """
    reference = dense if isinstance(dense, Reference) else Reference.of(dense)
    if isinstance(quantized, nn.Module):
        quantized.eval()
    body = Body.of(quantized)
    found = parts(rows, at_once=rows_for(body, rows, batch_size), masks_documents=masks_documents)
    columns, count = [np.empty((4, 0))], 0
    for some in grouped([body, *reference.computing], found):
        exact, other = reference.hidden(some, count), hidden_states_of(body, some)
        for part, sides in zip(some, zip(exact, other, strict=True), strict=True):
            columns += [_compared(*one) for one in _slices(reference.body, body, sides, part)]
            count += len(part.targets)
    return np.concatenate(columns, axis=1)


def costs_by_layer(
    dense: StreamedModel,
    weights: Mapping[str, Callable[[], mx.array]],
    rows: TokenRows,
    *,
    batch_size: int,
    masks_documents: bool,
) -> dict[str, float]:
    """Return the divergence in nats per token that quantizing each layer alone causes, the largest first.

    Memory holds one block, and the hidden states of the rows with a few of the layers quantized.

    Args:
        dense: the dense model.
        weights: by module path, a function that returns the dequantized weight of the quantized layer.
        rows: tokens and marks; their hidden states are held in memory.
        batch_size: largest number of rows in a forward pass.
        masks_documents: no token attends to another document in its row.
    """
    body = Body.of(dense)
    modules = dict(dense.model.named_modules())
    found = list(parts(rows, at_once=rows_for(body, rows, batch_size), masks_documents=masks_documents))
    exact = [hidden for some in grouped([body], found) for hidden in hidden_states_of(body, some)]
    size = sum(hidden.nbytes for hidden in exact)
    costs, names, at_once = {}, list(weights), max(1, HELD_BYTES // max(1, size))
    for paths in (names[first : first + at_once] for first in range(0, len(names), at_once)):
        changed = _with_each(body, {path: (modules[path], weights[path]) for path in paths}, found)
        for path in paths:
            total = 0.0
            layer, original, quantized = modules[path], modules[path]["weight"], weights[path]()
            for part, hidden, other in zip(found, exact, changed.pop(path), strict=True):
                for begin, end in _spans(body, hidden):
                    logits = body.logits(hidden[begin:end])
                    layer["weight"] = quantized
                    rounded = body.logits(other[begin:end])
                    layer["weight"] = original
                    total += float(_compared(logits, rounded, part.targets[begin:end])[2].sum())
            count = sum(len(part.targets) for part in found)
            costs[path] = max(0.0, total / max(1, count)) if math.isfinite(total) else math.inf
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def _with_each(
    body: Body, layers: Mapping[str, tuple[nn.Module, Callable[[], mx.array]]], found: Sequence[EvaluationRows]
) -> dict[str, list[mx.array]]:
    """Return the hidden states at the target positions, (N, D) for each batch, with each layer alone changed.

    Args:
        body: of a streamed model, which reads each block once for all layers.
        layers: and what returns their other weight, by path.
        found: rows.
    """
    states = {}
    with body.passes() as evaluate:
        for path, (layer, weight) in layers.items():
            original, layer["weight"] = layer["weight"], weight()
            states[path] = [at_targets(body.hidden(part.tokens, part.pieces), part) for part in found]
            layer["weight"] = original
        evaluate()
    mx.eval(states)
    return states


def _slices(
    dense: Body, quantized: Body, sides: tuple[mx.array, mx.array], part: EvaluationRows
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    """Yield both models' logits, (N, V), and the targets, (N,), a slice of positions at a time."""
    for begin, end in _spans(dense, sides[0]):
        yield dense.logits(sides[0][begin:end]), quantized.logits(sides[1][begin:end]), part.targets[begin:end]


def _spans(body: Body, hidden: mx.array) -> Iterator[tuple[int, int]]:
    step = positions_at_once(body.logits(hidden[:1]).shape[-1], arrays=_ARRAYS)
    return ((begin, begin + step) for begin in range(0, len(hidden), step))


def _compared(exact: mx.array, rounded: mx.array, targets: mx.array) -> NDArray[np.float64]:
    """Return both losses, the divergence and the top-1 agreement of each position, (4, N)."""
    values: list[mx.array] = _compare(exact.astype(mx.float32), rounded.astype(mx.float32), targets)
    return np.array([numpy_of(value) for value in values], np.float64)


@mx.compile
def _compare(exact: mx.array, rounded: mx.array, targets: mx.array) -> list[mx.array]:
    logs = [logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (exact, rounded)]
    losses = [-mx.take_along_axis(log, targets[..., None], axis=-1).squeeze(-1) for log in logs]
    kl = (mx.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1)
    return [*losses, kl, exact.argmax(axis=-1) == rounded.argmax(axis=-1)]
