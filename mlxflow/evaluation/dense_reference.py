"""The dense model's hidden states on validation rows, cached for every quantized model that is compared with it.

Logits are too many to store, R * L * V. Hidden states are few, R * L * D, and the head computes the same logits from
them to the bit.
"""

import gc
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.positions import (
    EvaluationRows,
    TokenRows,
    count_positions,
    grouped,
    hidden_states_of,
    parts,
    rows_for,
)
from mlxflow.evaluation.streamed_model import StreamedModel
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
    def of(cls, model: nn.Module | StreamedModel) -> "Reference":
        """Return a reference without a cache: each comparison runs the model."""
        if isinstance(model, nn.Module):
            model.eval()
        return cls(Body.of(model), None)

    @property
    def computing(self) -> list[Body]:
        """The body, if comparisons run it; none if its results are cached."""
        return [self.body] if self._kept is None else []

    def hidden(self, some: Sequence[EvaluationRows], begin: int) -> list[mx.array]:
        """Return the hidden states at the target positions of some consecutive forward passes, (N, D) each.

        Args:
            some: their rows.
            begin: number of target positions in all rows before them.
        """
        if self._kept is None:
            return hidden_states_of(self.body, some)
        ends = np.cumsum([begin, *(len(part.targets) for part in some)]).tolist()
        return [self._kept.read(*span) for span in itertools.pairwise(ends)]


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
        load: returns the dense model with lazy weights of its own; see `StreamedModel`. With cached hidden states, only
            those of its head are read.
        rows: tokens and marks.
        folder: of the cache.
        key: a file name that identifies the model's content, the rows and everything else the hidden states depend on.
        batch_size: largest number of rows in a forward pass.
        masks_documents: no token attends to another document in its row.
    """
    model = StreamedModel(load)
    file = folder / f"{key}{_SUFFIX}"
    with suppress(ArtifactError):
        return _opened(model.model, file)
    body = Body.of(model)
    if body.path is None:
        return Reference(body, None)
    found = parts(rows, at_once=rows_for(body, rows, batch_size), masks_documents=masks_documents)
    begun = (hidden for some in grouped([body], found) for hidden in hidden_states_of(body, some))
    hidden = next(begun, None)
    if hidden is None:
        return Reference(body, None)
    shape = (count_positions(rows), hidden.shape[-1])
    size = sum(value.nbytes for _, value in tree_flatten(model.model.parameters()))
    if shape[0] * shape[1] * hidden.dtype.size > max(size, _ALWAYS_KEPT_BYTES):
        return Reference(body, None)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_files.beside(file)
    with tensor_writing.TensorFile(temporary, {_NAME: (hidden.dtype, shape)}, {"body": body.path}) as out:
        out.put_rows(_NAME, hidden)
        for one in begun:
            out.put_rows(_NAME, one)
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
