"""The dense model's hidden states on validation rows, cached for every quantized model that is compared with it.

Logits are too many to store, R * L * V. Hidden states are few, R * L * D, and the head computes the same logits from
them to the bit.
"""

import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.positions import EvaluationRows, TokenRows, count_positions, hidden_states, parts, rows_for
from mlxflow.messages.errors import ArtifactError
from mlxflow.storage import temporary_files, tensor_reading, tensor_writing

_SUFFIX, _NAME = ".safetensors", "hidden"

# The most cached files in a folder; the least recently used is removed first
_MOST_FILES = 4

# Hidden states are cached if they are no larger than the model, or than this
_ALWAYS_KEPT_BYTES = 1 << 30


class Reference:
    """The dense side of a comparison: cached hidden states, or a model that computes them.

    Attributes:
        body: the model's body and head; its head maps hidden states to logits.
    """

    def __init__(self, body: Body, stored: tensor_reading.StoredRows | None) -> None:
        self.body = body
        self._kept = stored

    @classmethod
    def of(cls, model: nn.Module) -> "Reference":
        """Return a reference without a cache: each comparison runs the model."""
        model.eval()
        return cls(Body.of(model), None)

    def hidden(self, part: EvaluationRows, begin: int) -> mx.array:
        """Return the hidden states at the target positions of some rows, (N, D).

        Args:
            part: the rows.
            begin: number of target positions in all rows before them.
        """
        if self._kept is None:
            return hidden_states(self.body, part)
        return self._kept.read(begin, begin + len(part.targets))


def cached_reference(
    load: Callable[[], nn.Module],
    rows: TokenRows,
    *,
    folder: Path,
    key: str,
    batch_size: int,
    masks_documents: bool,
) -> Reference:
    """Return the reference of a dense model from the cache; if it is not there, compute it and store it.

    Hidden states larger than the model (and than a gigabyte) are not stored, nor are those of a model whose body is not
    recognized: then each comparison computes them.

    Args:
        load: returns the dense model with lazy weights; with cached hidden states, only those of its head are read. It
            is called again once they are stored, so that the weights of the body are freed.
        rows: tokens and marks.
        folder: of the cache.
        key: a file name that identifies the model's content, the rows and everything else the hidden states depend on.
        batch_size: largest number of rows in a forward pass.
        masks_documents: no token attends to another document in its row.
    """
    model = load()
    model.eval()
    file = folder / f"{key}{_SUFFIX}"
    with suppress(ArtifactError):
        return _opened(model, file)
    body = Body.of(model)
    if body.path is None:
        return Reference(body, None)
    begun = parts(rows, at_once=rows_for(model, body, rows, batch_size), masks_documents=masks_documents)
    first = next(begun, None)
    if first is None:
        return Reference(body, None)
    hidden = hidden_states(body, first)
    shape = (count_positions(rows), hidden.shape[-1])
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    if shape[0] * shape[1] * hidden.dtype.size > max(size, _ALWAYS_KEPT_BYTES):
        return Reference(body, None)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_files.beside(file)
    with tensor_writing.TensorFile(temporary, {_NAME: (hidden.dtype, shape)}, {"body": body.path}) as out:
        out.put_rows(_NAME, hidden)
        for part in begun:
            out.put_rows(_NAME, hidden_states(body, part))
    temporary.replace(file)
    remove_oldest(folder)
    del model, body, begun
    gc.collect()  # weights that are in reference cycles
    mx.clear_cache()
    lazy = load()
    lazy.eval()
    return _opened(lazy, file)


def _opened(model: nn.Module, file: Path) -> Reference:
    """Return the reference that is stored in a file.

    Raises:
        ArtifactError: there is no such file, or it is damaged.
    """
    stored = tensor_reading.stored_rows(file)[_NAME]
    body = Body(model, tensor_reading.read_metadata(file)["body"])
    file.touch()  # for `remove_oldest`
    return Reference(body, stored)


def remove_oldest(folder: Path) -> None:
    """Remove the least recently used files of a cache of tensors, all but four."""
    files = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-_MOST_FILES]:
        file.unlink(missing_ok=True)
