"""What training makes small: the loss of a model on rows of tokens, as a sum and the number of tokens in it."""

from collections.abc import Callable
from typing import NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow import models, packed
from mlxflow.errors import WorkflowError
from mlxflow.quantization.fake import fake_weight, plain_type
from mlxflow.training.loss import cross_entropy, linear_cross_entropy

#: Takes a model, tokens and marks, (B, L + 1) each; returns the sum of the losses in nats, in fp32, and how many tokens
#: it is of, in fp32 too.
Objective = Callable[[nn.Module, mx.array, mx.array], tuple[mx.array, mx.array]]

# Rows whose logits are held at a time: on a GPU enough for the matrix units, on a CPU what stays in its cache
_CHUNK_BYTES = {"gpu": 1 << 28, "cpu": 1 << 20}


class Head(NamedTuple):
    """Where hidden states become logits.

    Attributes:
        is_tied: it is the embedding's weight.
    """

    is_tied: bool

    def module(self, model: nn.Module) -> nn.Module:
        """Return the layer that holds the weight."""
        return model.model.embed_tokens if self.is_tied else model.lm_head

    def weight(self, model: nn.Module, dtype: mx.Dtype) -> mx.array:
        """Return the weight, (V, D), dequantized where it is quantized, rounded in fake quantization."""
        layer = self.module(model)
        if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            return models.dense_weight(layer).astype(dtype)
        faked = fake_weight(layer)
        return cast("mx.array", layer.weight) if faked is None else faked

    def is_trained(self, model: nn.Module) -> bool:
        """Return whether the weight is one of the trainable parameters."""
        return "weight" in self.module(model).trainable_parameters()


def find_head(model: nn.Module, vocab_size: int) -> Head | None:
    """Return a model's head, if it is a plain product with one weight.

    Asked of the model itself on a few tokens: logits that are scaled, capped or given a bias afterwards fail it.

    Args:
        model: of any architecture that mlx-lm knows.
        vocab_size: ids that may be used to try it.
    """
    body = getattr(model, "model", None)
    is_tied = "lm_head" not in model
    layer = getattr(body, "embed_tokens", None) if is_tied else model.lm_head
    plain = (nn.Embedding, nn.QuantizedEmbedding) if is_tied else (nn.Linear, nn.QuantizedLinear)
    if not isinstance(layer, nn.Module) or plain_type(layer) not in plain or "bias" in layer:
        return None
    head = Head(is_tied)
    was_training = model.training
    model.eval()
    tokens = mx.arange(1, 9)[None] % vocab_size
    try:
        hidden = cast("Callable[[mx.array], mx.array]", body)(tokens)
        ours = (hidden @ head.weight(model, hidden.dtype).T).astype(mx.float32)
        theirs = model(tokens).astype(mx.float32)
        fits = ours.shape == theirs.shape and float(mx.abs(ours - theirs).max()) < 0.02 * float(mx.abs(theirs).max())
    except (AttributeError, TypeError, ValueError):
        fits = False
    model.train(was_training)
    return head if fits else None


def plain_objective(*, masks_documents: bool, uses_kernel: bool = False) -> Objective:
    """Return the objective that holds all logits of a batch.

    Args:
        masks_documents: no token attends to another document in its row.
        uses_kernel: see `loss.cross_entropy`.
    """

    def objective(model: nn.Module, tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        weights = (marks[:, 1:] & 1).astype(mx.float32)
        logits = packed.apply(model, tokens[:, :-1], marks[:, :-1] if masks_documents else None)
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
        wanted = mx.stop_gradient(packed.apply(teacher, tokens[:, :-1], pieces)).astype(mx.float32)
        logits = packed.apply(model, tokens[:, :-1], pieces).astype(mx.float32)
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
        hidden = packed.apply_body(model, tokens[:, :-1], marks[:, :-1] if masks_documents else None)
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
