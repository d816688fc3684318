"""Training losses: the summed loss of a model on rows of tokens, and the number of target tokens."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.messages.errors import WorkflowError
from mlxflow.ops import document_mask
from mlxflow.training.loss import cross_entropy, linear_cross_entropy
from mlxflow.training.output_head import Head, find_head, known_head

#: Takes a model, tokens and marks, (B, L + 1) each, and further arrays of the rows if it needs any; returns the sum of
#: the losses in nats and the number of target tokens, two scalars in fp32.
Objective = Callable[..., tuple[mx.array, mx.array]]

# Bytes of logits held at a time: on a GPU enough for the matrix units, on a CPU so few that its cache holds them
_CHUNK_BYTES = {"gpu": 1 << 28, "cpu": 1 << 20}


def plain_objective(*, masks_documents: bool, uses_kernel: bool = False) -> Objective:
    """Return the cross-entropy objective that holds all logits of a batch.

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
    """Return the objective that distills a teacher's distributions into a model; holds all logits of both.

    The loss of a token is the cross-entropy against the teacher's probabilities: the divergence (Hinton et al. 2015,
    arXiv:1503.02531, at temperature 1) plus the teacher's own entropy, which has no gradient.

    Args:
        teacher: in evaluation mode; its logits are over the same vocabulary.
        masks_documents: no token attends to another document in its row.
    """

    def objective(model: nn.Module, tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        weights = (marks[:, 1:] & 1).astype(mx.float32)
        pieces = marks[:, :-1] if masks_documents else None
        teacher_logits = mx.stop_gradient(document_mask.apply(teacher, tokens[:, :-1], pieces)).astype(mx.float32)
        logits = document_mask.apply(model, tokens[:, :-1], pieces).astype(mx.float32)
        expected = (mx.softmax(teacher_logits, axis=-1) * logits).sum(axis=-1)
        return ((mx.logsumexp(logits, axis=-1) - expected) * weights).sum(), weights.sum()

    return objective


def fused_objective(head: Head, *, masks_documents: bool, chunk_rows: int, uses_kernel: bool = False) -> Objective:
    """Return the cross-entropy objective with fused output head, for some tokens at a time.

    Args:
        head: of the model.
        masks_documents: no token attends to another document in its row.
        chunk_rows: tokens whose logits are held at a time.
        uses_kernel: see `loss.cross_entropy`.
    """

    def objective(model: nn.Module, tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        weights = (marks[:, 1:] & 1).astype(mx.float32)
        hidden = document_mask.apply_body(model, tokens[:, :-1], marks[:, :-1] if masks_documents else None)
        packed = head.packed(model) if mx.default_device() != mx.cpu else None
        total = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            packed[0] if packed else head.weight(model, hidden.dtype),
            tokens[:, 1:].reshape(-1),
            weights.reshape(-1),
            chunk_rows=chunk_rows,
            trains_weight=head.is_trained(model),
            uses_kernel=uses_kernel,
            form=packed[1] if packed else None,
        )
        return total, weights.sum()

    return objective


def uses_fused_loss(
    model: nn.Module, *, wanted: bool | None, vocab_size: int, tokens: int, setting: str = "fused_loss"
) -> bool:
    """Return whether output head and loss are computed together.

    With `wanted` None: on the CPU always, where it costs no time. On a GPU for a frozen head, whose weight has no
    gradient to add up, as soon as the logits are more than those held at a time; for a trained one, where holding the
    logits is a little faster (`benchmarks/train.py`), if logits and their gradient take more memory than weights, and
    gradients and moments of those that are trained.

    Args:
        model: of any architecture that mlx-lm knows.
        wanted: True, False, or None to choose.
        vocab_size: V.
        tokens: of one forward pass.
        setting: the name of the setting, for the message.

    Raises:
        WorkflowError: it is wanted, and the model's logits are not the product of one weight.
    """
    if wanted is False:
        return False
    head = find_head(model, vocab_size)
    if head is not None:
        return wanted is True or _fused_loss_pays(model, head, vocab_size, tokens)
    if wanted:
        raise WorkflowError(
            f"{setting} = true: this model does more to its logits than one product. Set {setting} = false."
        )
    return False


def _fused_loss_pays(model: nn.Module, head: Head, vocab_size: int, tokens: int) -> bool:
    if mx.default_device() == mx.cpu:
        return True
    if not head.is_trained(model):
        return tokens > chunk_rows(vocab_size)
    held = _num_bytes(model.parameters()) + 3 * _num_bytes(model.trainable_parameters())
    return 2 * vocab_size * tokens * int(head.module(model).weight.itemsize) > held


def _num_bytes(parameters: Any) -> int:
    return sum(value.nbytes for _, value in tree_flatten(parameters))


def make_objective(
    model: nn.Module,
    *,
    fused: bool,
    vocab_size: int,
    masks_documents: bool,
    uses_kernel: bool = False,
    chunk_share: float = 1.0,
    has_head: bool = False,
) -> Objective:
    """Return the cross-entropy objective of a model.

    Args:
        model: whose layers have not been given kernels yet.
        fused: whether output head and loss are computed together; ignored where the logits are not one product.
        vocab_size: V.
        masks_documents: no token attends to another document in its row.
        uses_kernel: see `loss.cross_entropy`.
        chunk_share: share of the usual rows whose logits the fused loss holds at a time.
        has_head: whether `find_head` found the model's head before.
    """
    head = None
    if fused:
        head = known_head(model) if has_head else find_head(model, vocab_size)
    if head is None:
        return plain_objective(masks_documents=masks_documents, uses_kernel=uses_kernel)
    chunk = chunk_rows(vocab_size, share=chunk_share)
    return fused_objective(head, masks_documents=masks_documents, chunk_rows=chunk, uses_kernel=uses_kernel)


def chunk_rows(vocab_size: int, *, share: float = 1.0) -> int:
    """Return how many tokens' logits the fused loss holds at a time on the default device.

    Args:
        vocab_size: V.
        share: the result is this share of the usual number, at least 1.
    """
    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    rows = _CHUNK_BYTES[device] // (2 * vocab_size)
    return max(1, int(max(64, rows // 64 * 64) * share))
