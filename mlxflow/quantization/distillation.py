"""Rows for training with the dense model's cached distributions, and the loss of a model on them."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.device import compute_device
from mlxflow.messages import terminal
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.models.fp32_on_cpu import computed_dtype, loading_in_fp32_on_cpu
from mlxflow.ops import document_mask
from mlxflow.quantization import teacher_logits
from mlxflow.quantization.dense_model import DenseModel, identity_of
from mlxflow.quantization.teacher_logits import TeacherLogits, distillation_losses, losses_and_gradient
from mlxflow.storage.digests import digest_json
from mlxflow.storage.run_context import Context, derive_seed
from mlxflow.training.loss import linear_losses
from mlxflow.training.objective import Objective
from mlxflow.training.output_head import Head

#: The folder of the dense model's distributions in the state folder.
FOLDER = "teachers"

# Tokens stored for a position, and the largest file that is stored: above it the dense model runs in every step
_LIKELIEST, _MOST_BYTES = 64, 8 << 30


class TaughtRows(NamedTuple):
    """Rows to train on, with the distributions that the loss takes, and the cached file of these."""

    rows: Rows
    teacher: TeacherLogits


def teacher_of(dense: DenseModel, rows: Rows, *, masks_documents: bool, context: Context) -> TeacherLogits:
    """Return the dense model's distributions on some rows, computed unless another variant has done so.

    The file is found by the content of the model and the rows, whichever variant or method asks.

    Args:
        dense: the model.
        rows: of tokens.
        masks_documents: no token attends to another document in its row.
        context: of the stage.
    """
    text = hashlib.sha256(np.ascontiguousarray(rows.tokens).tobytes())
    text.update(np.ascontiguousarray(rows.marks).tobytes())
    key = {
        "model": identity_of(dense.folder, context),
        "rows": [list(rows.tokens.shape), text.hexdigest()],
        "masks": masks_documents,
        "likeliest": _LIKELIEST,
        "dtype": computed_dtype(),
        "weights": _dtypes_of(dense.model),
        "device": [context.device, compute_device.name()],
        "versions": [context.provenance["mlx"], context.provenance["mlxflow"]],
    }
    file = teacher_logits.teacher_file(context.state / FOLDER, digest_json(key))
    if not file.is_file():
        terminal.say(f"{context.task}: computing the dense model's distributions, once for all variants")
    metadata = {"format": "mlx", **{f"teacher.{name}": str(value) for name, value in key.items() if name != "rows"}}
    return teacher_logits.cached_teacher(
        loading_in_fp32_on_cpu(dense._replace(rotation=None).reopened),
        rows,
        masks_documents=masks_documents,
        num_likeliest=_LIKELIEST,
        file=file,
        metadata=metadata | {"teacher.text": text.hexdigest()},
    )


def _dtypes_of(model: nn.Module) -> list[str]:
    """Return the dtypes of a model's weights, which `quantize.dtype` casts."""
    return sorted({str(value.dtype) for _, value in tree_flatten(model.parameters())})


def taught_rows(
    dense: DenseModel, tokens: TokenFile, *, num_rows: int, masks_documents: bool, context: Context
) -> TaughtRows | None:
    """Return rows to train on with cached distributions; None if these are too large to be stored.

    Args:
        dense: the teacher.
        tokens: to train on.
        num_rows: that the training reads; if there are more, as many are chosen by the seed.
        masks_documents: no token attends to another document in its row.
        context: of the stage.
    """
    count = min(num_rows, tokens.rows.num_rows)
    size = teacher_logits.teacher_bytes(
        count * tokens.context_length, num_likeliest=_LIKELIEST, vocab_size=tokens.vocab_size
    )
    if size > _MOST_BYTES:
        terminal.say(f"{context.task}: the dense model runs in every step; its distributions are {show_bytes(size)}")
        return None
    rows = tokens.rows
    if count < rows.num_rows:
        random = np.random.default_rng(derive_seed(context.seed, "quantize.distillation"))
        batch = rows.take(np.sort(random.permutation(rows.num_rows)[:count]))
        rows = Rows(batch.tokens, batch.marks)
    teacher = teacher_of(dense, rows, masks_documents=masks_documents, context=context)
    return TaughtRows(rows._replace(extras=teacher.arrays), teacher)


def distilling_objective(*, masks_documents: bool, head: Head | None = None) -> Objective:
    """Return the objective of `taught_rows`: the divergence from the teacher at the target positions.

    Args:
        masks_documents: no token attends to another document in its row.
        head: of the model: logits are computed for some positions at a time; None to hold those of all positions.
    """

    def objective(model: nn.Module, tokens: mx.array, marks: mx.array, *teacher: mx.array) -> tuple[mx.array, mx.array]:
        weights = (marks[:, 1:] & 1).astype(mx.float32)
        pieces = marks[:, :-1] if masks_documents else None
        if head is None:
            logits = document_mask.apply(model, tokens[:, :-1], pieces)
            return (distillation_losses(logits, *teacher) * weights).sum(), weights.sum()
        hidden = document_mask.apply_body(model, tokens[:, :-1], pieces)
        return losses_of_hidden(model, head, hidden, teacher, weights), weights.sum()

    return objective


def losses_of_hidden(
    model: nn.Module, head: Head, hidden: mx.array, teacher: Sequence[mx.array], weights: mx.array
) -> mx.array:
    """Return the weighted sum of the divergences from the teacher, a scalar; holds the logits of some positions.

    Args:
        model: the student.
        head: of the student.
        hidden: states that the head takes, (B, L, D).
        teacher: ids, log-probabilities and those of the rest, of the same positions.
        weights: of the positions in the sum, (B, L), in fp32.
    """
    weight = head.weight(model, hidden.dtype)
    return linear_losses(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        [one.reshape(-1, *one.shape[2:]) for one in (*teacher, weights)],
        losses_and_gradient,
        chunk_rows=teacher_logits.positions_in_loss(weight.shape[0]),
        trains_weight=head.is_trained(model),
    )
