"""The dense model's likeliest next tokens on calibration rows, computed once for every variant that distills them.

Whole distributions are too many numbers, R * L * V. The log-probabilities of the K likeliest tokens hold nearly all of
the mass; what is left is one more class.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxflow.evaluation.dense_reference import remove_oldest
from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.positions import rows_for
from mlxflow.evaluation.slices import positions_at_once
from mlxflow.storage import temporary_files
from mlxflow.storage.tensor_reading import map_tensor
from mlxflow.storage.tensor_writing import TensorFile

# Arrays of logits held at a time
_ARRAYS = 4

_SUFFIX = ".teacher.safetensors"

# The least probability of all other tokens together, and of all that are listed
_LEAST = 1e-6


class TeacherLogits(NamedTuple):
    """The likeliest next tokens of a dense model, memory-mapped.

    Attributes:
        ids: (R, L, K).
        logs: their log-probabilities, (R, L, K), in fp16.
    """

    ids: NDArray[Any]
    logs: NDArray[Any]

    def of(self, rows: NDArray[Any]) -> tuple[mx.array, mx.array]:
        """Return ids and log-probabilities, (B, L, K) each, of rows of some numbers."""
        return mx.array(self.ids[rows]), mx.array(self.logs[rows]).astype(mx.float32)


def cached_teacher(
    load: Callable[[], nn.Module], tokens: NDArray[Any], *, num_likeliest: int, folder: Path, key: str
) -> TeacherLogits:
    """Return a dense model's likeliest next tokens from the cache; if they are not there, compute and store them.

    Args:
        load: returns the dense model in eval mode.
        tokens: (R, L) ids.
        num_likeliest: K.
        folder: of the cache.
        key: a file name that identifies the model's content, the tokens and everything else they depend on.
    """
    file = folder / f"{key}{_SUFFIX}"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, load(), tokens, num_likeliest)
        remove_oldest(folder)
    file.touch()  # for `remove_oldest`
    return TeacherLogits(map_tensor(file, "ids"), map_tensor(file, "logs"))


class _TeacherRows(NamedTuple):
    """Rows as `positions.TokenRows`."""

    tokens: NDArray[Any]

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    def batch(self, begin: int, end: int) -> tuple[Any, Any]:
        part = np.pad(self.tokens[begin:end], ((0, 0), (0, 1)))
        return part, np.ones_like(part)


def _write(file: Path, model: nn.Module, tokens: NDArray[Any], num_likeliest: int) -> None:
    num_rows, length = tokens.shape
    body = Body.of(model)
    at_once = rows_for(model, body, _TeacherRows(tokens), 32)
    vocab_size = body.logits(body.hidden(mx.array(tokens[:1, :1].astype(np.int32)), None)[0]).shape[-1]
    count = min(num_likeliest, vocab_size)
    step = positions_at_once(vocab_size, arrays=_ARRAYS)
    shape = (num_rows, length, count)
    temporary = temporary_files.beside(file)
    with TensorFile(temporary, {"ids": (mx.uint32, shape), "logs": (mx.float16, shape)}, {}) as out:
        for begin in range(0, num_rows, at_once):
            hidden = body.hidden(mx.array(tokens[begin : begin + at_once].astype(np.int32)), None)
            hidden = hidden.reshape(-1, hidden.shape[-1])
            mx.eval(hidden)
            for first in range(0, len(hidden), step):
                logits = body.logits(hidden[first : first + step]).astype(mx.float32)
                ids = mx.argpartition(-logits, count - 1, axis=-1)[:, :count]
                logs = mx.take_along_axis(logits, ids, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
                out.put_rows("ids", ids.astype(mx.uint32))
                out.put_rows("logs", logs.astype(mx.float16))
    temporary.replace(file)


def distillation_loss(logits: mx.array, ids: mx.array, logs: mx.array) -> mx.array:
    """Return the divergence of a student from the teacher in nats, mean over the positions.

    All tokens that are not among the teacher's likeliest are one class, so it is at most the divergence of the whole
    distributions.

    Args:
        logits: of the student, (B, L, V).
        ids: of the teacher's likeliest tokens, (B, L, K).
        logs: their log-probabilities, (B, L, K).
    """
    logits = logits.astype(mx.float32)
    ours = mx.take_along_axis(logits, ids, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    listed = (mx.exp(logs) * (logs - ours)).sum(axis=-1)
    rest, other = (mx.clip(1 - mx.exp(one).sum(axis=-1), _LEAST, 1) for one in (logs, ours))
    return (listed + rest * (mx.log(rest) - mx.log(other))).mean()
