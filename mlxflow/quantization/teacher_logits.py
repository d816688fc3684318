"""The dense model's likeliest next tokens on training rows, computed once for every variant that distills them.

Whole distributions are too many numbers, R * L * V. The log-probabilities of the K likeliest tokens hold nearly all of
the mass; all other tokens together are one more class, whose log-probability is stored, too. Without that class the
student learns the probabilities too large by the missing mass (Anshumann et al. 2025, arXiv:2503.16870).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.dense_reference import remove_oldest
from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.positions import all_positions, grouped, hidden_states_of, rows_for
from mlxflow.evaluation.slices import positions_at_once
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.report.stage_reports.quantize import TeacherFigures
from mlxflow.storage import temporary_files
from mlxflow.storage.tensor_reading import map_tensor
from mlxflow.storage.tensor_writing import TensorFile

# Arrays of logits held at a time
_ARRAYS = 4

# Rows in a forward pass
_ROWS_AT_ONCE = 32

_SUFFIX = ".teacher.safetensors"

# Log-probabilities that are stored at least; below it a class has no weight in any loss
_LEAST_LOG = -30.0

# The least probability that a student gives to all listed tokens together, or to all others
_LEAST = 1e-6

# Bytes of the logits in fp32 of the positions that a loss takes at a time
_CHUNK_BYTES = 64 << 20

# Ids below it are stored in 16 bits
_NARROW_IDS = 1 << 16


class TeacherLogits(NamedTuple):
    """The likeliest next tokens of a dense model, memory-mapped.

    Attributes:
        file: in the cache.
        ids: (R, L, K).
        logs: their log-probabilities, (R, L, K), in fp16.
        rest: log-probability of all other tokens together, (R, L), in fp16.
    """

    file: Path
    ids: NDArray[Any]
    logs: NDArray[Any]
    rest: NDArray[Any]

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """The arrays of all rows that `distillation_losses` takes."""
        return self.ids, self.logs, self.rest

    def of(self, rows: NDArray[Any]) -> tuple[mx.array, ...]:
        """Return ids and log-probabilities, (B, L, K) each, and the rest's, (B, L), of rows of some numbers."""
        return tuple(mx.array(array[rows]) for array in self.arrays)

    def figures(self) -> TeacherFigures:
        """Return the figures for the report."""
        num_rows, length, count = self.ids.shape
        step = max(1, (1 << 20) // length)
        listed = sum(
            float((1 - np.exp(self.rest[begin : begin + step].astype(np.float64))).sum())
            for begin in range(0, num_rows, step)
        )
        return TeacherFigures(
            file=self.file.name, tokens=num_rows * length, likeliest=count, probability=listed / (num_rows * length)
        )


def cached_teacher(
    load: Callable[[], nn.Module],
    rows: Rows,
    *,
    masks_documents: bool,
    num_likeliest: int,
    file: Path,
    metadata: Mapping[str, str],
) -> TeacherLogits:
    """Return a dense model's likeliest next tokens from a file; if it is not there, compute and write it.

    Args:
        load: returns the dense model in eval mode, with lazy weights of its own; see `StreamedModel`.
        rows: of tokens.
        masks_documents: no token attends to another document in its row.
        num_likeliest: K.
        file: its name identifies the model's content, the rows and everything else that the result depends on.
        metadata: text by key, for the header of a new file.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, StreamedModel(load), rows, num_likeliest, masks_documents=masks_documents, metadata=metadata)
        remove_oldest(file.parent)
    file.touch()  # for `remove_oldest`
    return TeacherLogits(file, *(map_tensor(file, name) for name in ("ids", "logs", "rest")))


def teacher_file(folder: Path, key: str) -> Path:
    """Return the file of a cache for a key."""
    return folder / f"{key}{_SUFFIX}"


def teacher_bytes(num_tokens: int, *, num_likeliest: int, vocab_size: int) -> int:
    """Return about the size of a file for some tokens."""
    ids = 2 if vocab_size <= _NARROW_IDS else 4
    return num_tokens * ((ids + 2) * min(num_likeliest, vocab_size) + 2)


def _write(
    file: Path,
    model: StreamedModel,
    rows: Rows,
    num_likeliest: int,
    *,
    masks_documents: bool,
    metadata: Mapping[str, str],
) -> None:
    num_rows, length = rows.num_rows, rows.tokens.shape[1] - 1
    body = Body.of(model)
    at_once = rows_for(body, rows, _ROWS_AT_ONCE)
    vocab_size = body.logits(body.hidden(mx.array(rows.tokens[:1, :1].astype(np.int32)), None)[0]).shape[-1]
    count = min(num_likeliest, vocab_size)
    kind = mx.uint16 if vocab_size <= _NARROW_IDS else mx.uint32
    step = positions_at_once(vocab_size, arrays=_ARRAYS)
    shape = (num_rows, length, count)
    temporary = temporary_files.beside(file)
    entries = {"ids": (kind, shape), "logs": (mx.float16, shape), "rest": (mx.float16, shape[:2])}
    with TensorFile(temporary, entries, metadata) as out:
        found = all_positions(rows, at_once=at_once, masks_documents=masks_documents)
        for hidden in (one for some in grouped([body], found) for one in hidden_states_of(body, some)):
            rest = []
            for first in range(0, len(hidden), step):
                ids, logs, other = _likeliest(body.logits(hidden[first : first + step]), count)
                out.put_rows("ids", ids.astype(kind))
                out.put_rows("logs", logs.astype(mx.float16))
                rest.append(other.astype(mx.float16))
            out.put_rows("rest", mx.concatenate(rest).reshape(-1, length))
    temporary.replace(file)


def _likeliest(logits: mx.array, count: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return the likeliest tokens of logits, (N, V): ids and log-probabilities, (N, K), and that of the rest, (N,)."""
    logits = logits.astype(mx.float32)
    ids = mx.argpartition(-logits, count - 1, axis=-1)[:, :count]
    whole = mx.logsumexp(logits, axis=-1, keepdims=True)
    logs = mx.take_along_axis(logits, ids, axis=-1) - whole
    others = mx.put_along_axis(logits, ids, mx.array(-mx.inf), axis=-1)
    rest = mx.logsumexp(others, axis=-1) - whole.squeeze(-1)
    return ids, mx.maximum(logs, _LEAST_LOG), mx.maximum(rest, _LEAST_LOG)


def distillation_losses(logits: mx.array, ids: mx.array, logs: mx.array, rest: mx.array) -> mx.array:
    """Return the divergence of a student from the teacher in nats at each position, (B, L).

    The loss of distillation (Hinton et al. 2015, arXiv:1503.02531, at temperature 1) minus the teacher's entropy, with
    all tokens that are not listed as one class: at most the divergence of the whole distributions.

    Args:
        logits: of the student, (B, L, V).
        ids: of the teacher's likeliest tokens, (B, L, K).
        logs: their log-probabilities, (B, L, K).
        rest: log-probability of all other tokens, (B, L).
    """
    logits, logs, rest = (one.astype(mx.float32) for one in (logits, logs, rest))
    ours = mx.take_along_axis(logits, ids, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    other = mx.log(mx.clip(1 - mx.exp(ours).sum(axis=-1), _LEAST, 1))
    return (mx.exp(logs) * (logs - ours)).sum(axis=-1) + mx.exp(rest) * (mx.maximum(rest, np.log(_LEAST)) - other)


def positions_in_loss(vocab_size: int) -> int:
    """Return the positions whose logits are held at a time: enough for the products, far fewer than in a batch."""
    return max(64, _CHUNK_BYTES // (4 * vocab_size))


def losses_and_gradient(
    logits: mx.array, ids: mx.array, logs: mx.array, rest: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the weighted sum of `distillation_losses` and its gradient with respect to the logits, in their dtype.

    With q the student's probabilities, p the teacher's, P the sum of the listed p, Q that of the listed q and r the
    teacher's rest, the gradient is (P - r Q / (1 - Q)) q, at the listed tokens r q / (1 - Q) - p more. Computed like
    this it takes fewer arrays of logits than MLX's gradient.

    Args:
        logits: of the student, (N, V).
        ids: see `distillation_losses`; (N, K), as `logs`.
        logs: log-probabilities.
        rest: (N,).
        weights: of the positions in the sum, (N,), in fp32.
    """
    kind = logits.dtype
    logits, logs, rest = (one.astype(mx.float32) for one in (logits, logs, rest))
    whole = mx.logsumexp(logits, axis=-1, keepdims=True)
    ours = mx.take_along_axis(logits, ids, axis=-1) - whole
    listed, expected, of_rest = mx.exp(ours), mx.exp(logs), mx.exp(rest)
    left = 1 - listed.sum(axis=-1)
    other = mx.clip(left, _LEAST, 1)
    losses = (expected * (logs - ours)).sum(axis=-1) + of_rest * (mx.maximum(rest, np.log(_LEAST)) - mx.log(other))
    pull = weights * mx.where(left == other, of_rest / other, 0)
    share = (weights * expected.sum(axis=-1) - pull * (1 - left))[:, None]
    gradient = share * mx.exp(logits - whole)
    at_listed = (share + pull[:, None]) * listed - weights[:, None] * expected
    return (losses * weights).sum(), mx.put_along_axis(gradient, ids, at_listed, axis=-1).astype(kind)
