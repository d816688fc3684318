"""What the peak memory of a validation will be, from the shapes of its arrays, before any: no loss is computed.

A validation is not compiled: its operations are neither merged nor fused, and the host sends all of a pass ahead.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.perplexity import positions_of_a_slice, token_losses
from mlxflow.evaluation.positions import rows_for
from mlxflow.ops.eval_mode import evaluating
from mlxflow.ops.graph_trace import trace
from mlxflow.training import graph_memory
from mlxflow.training.device_lag import Lag
from mlxflow.training.graph_fusion import Graph


def validation_peak_bytes(
    model: nn.Module, rows: Rows, held_bytes: int, *, batch_size: int, masks_documents: bool, lags: Sequence[Lag]
) -> list[int]:
    """Return the predicted peaks of MLX's arrays in a validation, one for each distance of the host.

    Args:
        model: in training; as before afterwards.
        rows: as many as a pass may have, of the length of validation rows.
        held_bytes: of the weights and the optimizer's state.
        batch_size: largest number of rows in a forward pass.
        masks_documents: no token attends to another document in its row.
        lags: see `graph_memory.peak_bytes`.

    Raises:
        ValueError: the model uses an operation that cannot be traced.
    """
    with evaluating(model):
        body = Body.of(model)
        some = rows.head(rows_for(body, rows, batch_size))
        tokens = mx.zeros((some.num_rows, some.tokens.shape[1] - 1), mx.int32)
        marks = mx.zeros(tokens.shape, mx.uint8)

        def hidden(marks: mx.array, tokens: mx.array) -> mx.array:
            states = body.hidden(tokens, marks if masks_documents else None)
            return states.reshape(-1, states.shape[-1])

        def losses(states: mx.array, targets: mx.array) -> mx.array:
            return token_losses(body, states, targets)

        of_body, states = _peak(model, hidden, [marks, tokens], held_bytes, lags)
        chosen = states[: positions_of_a_slice(body, states)]
        targets = mx.zeros(len(chosen), mx.int32)
        of_head, _ = _peak(model, losses, [chosen, targets], held_bytes + states.nbytes, lags)
    return [max(pair) for pair in zip(of_body, of_head, strict=True)]


def _peak(
    model: nn.Module, function: Any, arguments: list[mx.array], held_bytes: int, lags: Sequence[Lag]
) -> tuple[list[int], mx.array]:
    """Return the peaks of a function of arrays and the model's weights, and zeros in the shape of its result."""
    weights = dict(tree_flatten(model.parameters()))
    results: list[mx.array] = []

    def compute(*arrays: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(zip(weights, arrays[len(arguments) :], strict=True))))
        results[:] = [function(*arrays[: len(arguments)])]
        return results

    try:
        traced = trace(compute, [*arguments, *weights.values()], prefix="validation ")
    finally:
        model.update(tree_unflatten(list(weights.items())))
    graph = Graph(traced.operations, [value.name for value in traced.outputs], traced.inputs)
    shape, dtype = results[0].shape, results[0].dtype
    peaks = [graph_memory.peak_bytes([graph], held_bytes, {}, lag=lag) for lag in lags]
    return peaks, mx.zeros(shape, dtype)
