"""What training makes small: the loss of a model on rows of tokens, as a sum and the number of tokens in it."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.errors import WorkflowError
from mlxflow.ops import document_mask
from mlxflow.training.loss import cross_entropy, linear_cross_entropy
from mlxflow.training.output_head import Head, find_head

#: Takes a model, tokens and marks, (B, L + 1) each; returns the sum of the losses in nats, in fp32, and how many tokens
#: it is of, in fp32 too.
Objective = Callable[[nn.Module, mx.array, mx.array], tuple[mx.array, mx.array]]

# Rows whose logits are held at a time: on a GPU enough for the matrix units, on a CPU what stays in its cache
_CHUNK_BYTES = {"gpu": 1 << 28, "cpu": 1 << 20}


def plain_objective(*, masks_documents: bool, uses_kernel: bool = False) -> Objective:
    """Return the objective that holds all logits of a batch.

    Args:
        masks_documents: no token attends to another document in its row.
        uses_kernel: see `loss.cross_entropy`.
    """

    def objective(model: nn.Module, tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        weights = (marks[:, 1:] & 1).astype(mx.float32)
        logits = document_mask.apply(model, tokens[:, :-1], marks[:, :-1] if masks_documents else None)
        return (cross_entropy(logits, tokens[:, 1:], uses_kernel=uses_kernel) * weights).sum(), weights.sum()

    return objective


def distilling_objective(teacher: nn.Module, *, masks_documents: bool) -> Objective:
    """Return the objective that makes a model's distributions those of another one; holds all logits of both.

    The loss of a token is the cross-entropy against the teacher's probabilities: the divergence (Hinton et al. 2015,
    arXiv:1503.02531, at temperature 1) plus the teacher's own entropy, which has no gradient.

    Args:
        teacher: in evaluation mode; its logits are over the same vocabulary.
        masks_documents: no token attends to another document in its row.
    """

    def objective(model: nn.Module, tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        weights = (marks[:, 1:] & 1).astype(mx.float32)
        pieces = marks[:, :-1] if masks_documents else None
        wanted = mx.stop_gradient(document_mask.apply(teacher, tokens[:, :-1], pieces)).astype(mx.float32)
        logits = document_mask.apply(model, tokens[:, :-1], pieces).astype(mx.float32)
        expected = (mx.softmax(wanted, axis=-1) * logits).sum(axis=-1)
        return ((mx.logsumexp(logits, axis=-1) - expected) * weights).sum(), weights.sum()

    return objective


def fused_objective(head: Head, *, masks_documents: bool, chunk_rows: int, uses_kernel: bool = False) -> Objective:
    """Return the objective that computes the head's product and the loss together, some tokens at a time.

    Args:
        head: of the model.
        masks_documents: no token attends to another document in its row.
        chunk_rows: tokens whose logits are held at a time.
        uses_kernel: see `loss.cross_entropy`.
    """

    def objective(model: nn.Module, tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        weights = (marks[:, 1:] & 1).astype(mx.float32)
        hidden = document_mask.apply_body(model, tokens[:, :-1], marks[:, :-1] if masks_documents else None)
        total = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight(model, hidden.dtype),
            tokens[:, 1:].reshape(-1),
            weights.reshape(-1),
            chunk_rows=chunk_rows,
            trains_weight=head.is_trained(model),
            uses_kernel=uses_kernel,
        )
        return total, weights.sum()

    return objective


def choose_objective(
    model: nn.Module,
    *,
    fused: bool | None,
    vocab_size: int,
    tokens: int,
    masks_documents: bool,
    uses_kernel: bool = False,
) -> tuple[bool, Objective]:
    """Return whether head and loss are one, and the objective.

    Left to itself it takes the fused one on the CPU always, where it costs nothing, and on a GPU, where holding the
    logits is a little faster (`benchmarks/train.py`), if logits and their gradient take more memory than weights,
    gradients and moments do.

    Args:
        model: of any architecture that mlx-lm knows.
        fused: True, False, or None to choose.
        vocab_size: V.
        tokens: of one forward pass.
        masks_documents: no token attends to another document in its row.
        uses_kernel: see `loss.cross_entropy`.

    Raises:
        WorkflowError: the fused one is wanted, and the model does more to its logits than one product.
    """
    parameters = sum(value.size for _, value in tree_flatten(model.parameters()))
    pays = mx.default_device() == mx.cpu or 2 * vocab_size * tokens > 4 * parameters
    if fused is False or (fused is None and not pays):
        return False, plain_objective(masks_documents=masks_documents, uses_kernel=uses_kernel)
    head = find_head(model, vocab_size)
    if head is not None:
        chunk = chunk_rows(vocab_size)
        return True, fused_objective(head, masks_documents=masks_documents, chunk_rows=chunk, uses_kernel=uses_kernel)
    if fused:
        raise WorkflowError(
            "train.fused_loss = true: this model does more to its logits than one product. "
            "Set train.fused_loss = false."
        )
    return False, plain_objective(masks_documents=masks_documents, uses_kernel=uses_kernel)


def chunk_rows(vocab_size: int) -> int:
    """Return how many tokens' logits the fused loss holds at a time on the default device."""
    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    rows = _CHUNK_BYTES[device] // (2 * vocab_size)
    return int(max(64, rows // 64 * 64))
