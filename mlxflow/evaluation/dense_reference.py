"""What a dense model makes of validation rows, computed once and kept for every model that is compared with it.

Its logits are too many to keep, R * L * V; its hidden states are few, R * L * D, and the head alone makes the very same
logits of them again.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.errors import ArtifactError
from mlxflow.evaluation.model_body import Body
from mlxflow.evaluation.positions import EvaluationRows, TokenRows, count_positions, hidden_states, parts, rows_for
from mlxflow.storage import temporary_files, tensor_reading, tensor_writing

_SUFFIX, _NAME = ".safetensors", "hidden"

# Files that a folder of kept references has at most: the oldest in use goes first
_MOST_FILES = 4

# Hidden states are kept while they are no larger than the model, or this
_ALWAYS_KEPT_BYTES = 1 << 30


class Reference:
    """The dense side of a comparison.

    Attributes:
        body: by which logits follow from hidden states.
    """

    def __init__(self, body: Body, kept: tensor_reading.StoredRows | None) -> None:
        self.body = body
        self._kept = kept

    @classmethod
    def of(cls, model: nn.Module) -> "Reference":
        """Return a model that computes for each comparison anew."""
        model.eval()
        return cls(Body.of(model), None)

    def hidden(self, part: EvaluationRows, begin: int) -> mx.array:
        """Return the hidden states of the positions that count in some rows, (N, D).

        Args:
            part: the rows.
            begin: positions that count in all rows before them.
        """
        if self._kept is None:
            return hidden_states(self.body, part)
        return self._kept.read(begin, begin + len(part.targets))


def kept_reference(
    load: Callable[[], nn.Module],
    rows: TokenRows,
    *,
    folder: Path,
    key: str,
    batch_size: int,
    masks_documents: bool,
) -> Reference:
    """Return the dense side from a folder, where it is kept already; else compute and keep it.

    Hidden states that would take more room than the model (and than a gigabyte) are not kept, nor is a model without a
    body that can be told: then each comparison computes them.

    Args:
        load: gives the dense model, its weights still on the disk; where its hidden states are kept, those of its body
            stay there.
        rows: of tokens and marks.
        folder: of the kept files.
        key: a file name that stands for the model's content, the rows and all else that the hidden states follow from.
        batch_size: rows a forward pass at most.
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
    _remove_oldest(folder)
    return _opened(model, file)


def _opened(model: nn.Module, file: Path) -> Reference:
    """Return what is kept in a file.

    Raises:
        ArtifactError: there is no such file, or it is damaged.
    """
    kept = tensor_reading.stored_rows(file)[_NAME]
    body = Body(model, tensor_reading.read_metadata(file)["body"])
    file.touch()  # the oldest in use goes first
    return Reference(body, kept)


def _remove_oldest(folder: Path) -> None:
    files = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-_MOST_FILES]:
        file.unlink(missing_ok=True)
