"""The steps that a training run takes, with its settings, in phases that a memory profiler can tell apart."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxflow.data.loader import DeviceBatch, Loader
from mlxflow.data.token_file import Rows
from mlxflow.device import phase_peaks
from mlxflow.kernels import model_kernels
from mlxflow.ops import gradient_checkpointing
from mlxflow.ops.overrides import Arithmetic
from mlxflow.training import objective
from mlxflow.training.batch_size import split
from mlxflow.training.loss import cross_entropy, linear_cross_entropy
from mlxflow.training.optimizers import Update, make_optimizer
from mlxflow.training.output_head import find_head
from mlxflow.training.step import Gradients, Step


class Settings(NamedTuple):
    """What decides the memory of a training step, beside the model.

    Attributes:
        batch_size: rows in one forward pass, B.
        grad_accum_steps: forward passes whose gradients an update sums.
        optimizer: of `mlx.optimizers`, in small letters.
        optimizer_options: its other options.
        precision: "fp32", "bf16" (fp32 weights and moments beside the model) or "bf16-pure".
        checkpoint_every: of so many layers one computes its activations anew; 0 for none.
        fused_loss: whether head and loss are one.
        is_deterministic: every gradient is added up in one order: see `training.arithmetic`.
        kernels: names of our own that serve.
        chunk_share: of the fused loss's chunk of rows that is held at a time; 1 but in trials with fewer rows.
    """

    batch_size: int
    grad_accum_steps: int
    optimizer: str
    optimizer_options: dict[str, Any]
    precision: str
    checkpoint_every: int
    fused_loss: bool
    is_deterministic: bool = True
    kernels: tuple[str, ...] = ()
    chunk_share: float = 1.0


class Phases(Protocol):
    """Opens a phase of a name."""

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """Return what is open while the phase lasts."""
        ...


class MeasuredSteps:
    """Trains a model step by step, waiting for each part of it.

    Args:
        model: in the type that it is trained in; changed by every step.
        loader: of `batch_size * grad_accum_steps` rows.
        settings: of the step.
        loss: what is made small.
        phases: opens a phase around each part: "data", "forward_backward", "update".
        served: which kernels may be used.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        settings: Settings,
        loss: objective.Objective,
        phases: Phases,
        served: model_kernels.Serving,
    ) -> None:
        optimizer = make_optimizer(
            name=settings.optimizer,
            schedule=lambda _: mx.array(1e-5),
            weight_decay=0.0,
            options=settings.optimizer_options,
        )
        self._update = Update(
            model, optimizer, max_grad_norm=1.0, has_masters=settings.precision == "bf16", serves=served.serves
        )
        how = Arithmetic(is_deterministic=settings.is_deterministic, attention=served.attention)
        self._step = Step(model, self._update, loss, arithmetic=how)
        self._model = model
        self._loader = loader
        self._settings = settings
        self._phases = phases
        mx.eval(self._step.state)

    def run(self) -> int:
        """Take one step and wait for it; return the tokens that it trained on."""
        with self._phases("data"):
            batch = next(self._loader)
            mx.eval(batch.tokens, batch.marks)
        with self._phases("forward_backward"):
            gradients = self._gradients(batch)
            mx.eval(gradients)
        with self._phases("update"):
            mx.eval(*self._step.update(gradients), self._step.state)
            del gradients
            mx.synchronize()  # a result is there before the buffers behind it are given back
        return batch.targets

    def _gradients(self, batch: DeviceBatch) -> Gradients:
        if self._settings.grad_accum_steps == 1:
            return self._step.compute(batch.tokens, batch.marks)
        so_far = None
        for begin, end in split(len(batch.tokens), self._settings.batch_size):
            so_far = self._step.add(batch.tokens[begin:end], batch.marks[begin:end], so_far)
            mx.eval(so_far)
        assert so_far is not None  # noqa: S101 - there is a row at least
        return so_far

    def tree_bytes(self, context_length: int) -> dict[str, int]:
        """Return the bytes of what a step has in memory, by what it is, from the arrays themselves.

        Args:
            context_length: of the rows, L.
        """
        trainable = self._model.trainable_parameters()
        accumulates = self._settings.grad_accum_steps > 1
        rows = self._settings.batch_size * self._settings.grad_accum_steps
        weights = num_bytes(self._model.parameters())
        masters = num_bytes(self._update.state["weights"]) if self._settings.precision == "bf16" else 0
        return {
            "weights_bytes": weights,
            "optimizer_bytes": num_bytes(self._update.state["optimizer"]) + masters,
            "gradients_bytes": sum(
                leaf.size * 4 if accumulates else leaf.nbytes for _, leaf in tree_flatten(trainable)
            ),
            "data_bytes": 2 * rows * (context_length + 1) * (4 + 1),  # this batch and the next; ids and marks
        }


def num_bytes(tree: Any) -> int:
    """Return the bytes of a tree's arrays."""
    return sum(leaf.nbytes for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array))


@contextmanager
def measured_steps(
    model: nn.Module,
    rows: Rows,
    settings: Settings,
    *,
    vocab_size: int,
    masks_documents: bool,
    seed: int,
    phases: Phases,
) -> Iterator[MeasuredSteps]:
    """Give the steps of a training run on rows of tokens.

    Args:
        model: changed.
        rows: at least one step's of them.
        settings: of the step.
        vocab_size: V.
        masks_documents: no token attends to another document in its row.
        seed: of the order of the rows.
        phases: opens a phase around each part of a step.
    """
    if settings.precision != "fp32":
        model.set_dtype(mx.bfloat16)
        mx.eval(model.parameters())
    model.train()
    sums = settings.grad_accum_steps > 1
    served = model_kernels.recorded_for(
        model,
        precision=settings.precision,
        names=settings.kernels,
        context_length=rows.tokens.shape[1] - 1,
        masks_documents=masks_documents,
        sums_gradients=sums,
    )
    loss = _objective(model, settings, vocab_size, masks_documents, served.serves_loss)
    size = settings.batch_size * settings.grad_accum_steps
    with (
        served.fitted(),
        gradient_checkpointing.recomputed(model, every=settings.checkpoint_every),
        Loader(rows, batch_size=size, seed=seed, workers=2, prefetch_batches=4) as loader,
    ):
        yield MeasuredSteps(model, loader, settings, loss, phases, served)


def _objective(
    model: nn.Module, settings: Settings, vocab_size: int, masks: bool, uses_kernel: bool
) -> objective.Objective:
    head = find_head(model, vocab_size) if settings.fused_loss else None
    if head is None:
        return objective.plain_objective(masks_documents=masks, uses_kernel=uses_kernel)
    chunk = _chunk_rows(settings, vocab_size)
    return objective.fused_objective(head, masks_documents=masks, chunk_rows=chunk, uses_kernel=uses_kernel)


def _chunk_rows(settings: Settings, vocab_size: int) -> int:
    return max(1, int(objective.chunk_rows(vocab_size) * settings.chunk_share))


def silent(name: str) -> AbstractContextManager[None]:
    """Open a phase that nobody looks at."""
    return nullcontext()


def logits_bytes(model: nn.Module, settings: Settings, *, vocab_size: int, context_length: int) -> int:
    """Return what head and loss take beyond their inputs and gradients, by running them on their own.

    Args:
        model: its weights are read.
        settings: of the step.
        vocab_size: V.
        context_length: of the rows, L.
    """
    head = find_head(model, vocab_size)
    tokens = settings.batch_size * context_length
    if head is None:
        weights = tree_flatten(model.parameters())
        return 2 * tokens * vocab_size * int(weights[0][1].itemsize)
    dtype = mx.float32 if settings.precision == "fp32" else mx.bfloat16
    weight = head.weight(model, dtype)
    hidden = mx.zeros((tokens, weight.shape[-1]), dtype)
    targets, ones = mx.zeros((tokens,), mx.int32), mx.ones((tokens,))

    def loss(hidden: mx.array, weight: mx.array) -> mx.array:
        if not settings.fused_loss:
            return (cross_entropy(hidden @ weight.T, targets) * ones).sum()
        chunk = _chunk_rows(settings, vocab_size)
        return linear_cross_entropy(hidden, weight, targets, ones, chunk_rows=chunk, trains_weight=True)

    mx.eval(hidden, weight, targets, ones)
    before = mx.get_active_memory()
    with phase_peaks.followed() as peak:
        compute = mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))
        result = compute(hidden, weight)
        mx.eval(result)
    return max(0, peak.bytes - before - num_bytes(result[1]))
