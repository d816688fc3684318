"""Training steps with the settings of a run, split into phases for a memory profiler: data, passes, update."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxflow.data.loader import Loader
from mlxflow.data.token_file import Rows
from mlxflow.device import phase_peaks
from mlxflow.profiling.peak_breakdown import StepBytes
from mlxflow.training import build
from mlxflow.training.loss import cross_entropy, linear_cross_entropy
from mlxflow.training.objective import chunk_rows
from mlxflow.training.output_head import find_head
from mlxflow.training.step import Step, accumulate
from mlxflow.training.weight_dtypes import dtype_of


class Phases(Protocol):
    """Opens a phase by name."""

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """Return a context manager that is open during the phase."""
        ...


class ProfiledSteps:
    """Trains a model step by step, waiting for each part of a step.

    Args:
        subject: the model, changed by every step, and its settings.
        step: a step of the model.
        loader: yields batches of `rows_per_step` rows.
        phases: opens a phase around each part: "data", "forward_backward", "update".
    """

    def __init__(self, subject: build.Subject, step: Step, loader: Loader, phases: Phases) -> None:
        self._subject = subject
        self._step = step
        self._loader = loader
        self._phases = phases
        mx.eval(self._step.state)

    def run(self) -> mx.array:
        """Take one step and wait for it; return its mean loss."""
        batch_size = self._subject.settings.batch_size
        with self._phases("data"):
            batch = next(self._loader)
            mx.eval(batch.tokens, batch.marks)
        with self._phases("forward_backward"):
            width = self._subject.context_length  # padding, too: the peak is that of the longest rows
            gradients = accumulate(self._step, batch, batch_size=batch_size, width=width, after_each=mx.eval)
            mx.eval(gradients)
        with self._phases("update"):
            outcome = self._step.update(gradients)
            mx.eval(*outcome, self._step.state)
            del gradients
            mx.synchronize()  # results are ready before their buffers are freed
        return outcome.loss

    def tree_bytes(self) -> StepBytes:
        """Return the bytes of weights, optimizer state, gradients and data of a step, from the sizes of the arrays."""
        model, settings = self._subject.model, self._subject.settings
        trainable, updated = model.trainable_parameters(), self._step.state[1]
        accumulates = settings.grad_accum_steps > 1
        positions = settings.rows_per_step * (self._subject.context_length + 1)
        masters = num_bytes(updated["weights"]) if settings.precision == "bf16" else 0
        return StepBytes(
            weights=num_bytes(model.parameters()),
            optimizer=num_bytes(updated["optimizer"]) + masters,
            gradients=sum(leaf.size * 4 if accumulates else leaf.nbytes for _, leaf in tree_flatten(trainable)),
            data=2 * positions * (4 + 1),  # this batch and the next; ids and marks
        )


def num_bytes(tree: Any) -> int:
    """Return the size in bytes of a tree's arrays."""
    return sum(leaf.nbytes for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array))


@contextmanager
def profiled_steps(
    subject: build.Subject, rows: Rows, *, seed: int, phases: Phases, chunk_share: float = 1.0
) -> Iterator[ProfiledSteps]:
    """Yield the steps of a training run on rows of tokens.

    Args:
        subject: the model, changed, and its settings.
        rows: at least as many as one step takes.
        seed: of the order of the rows.
        phases: opens a phase around each part of a step.
        chunk_share: see `objective.make_objective`.
    """
    settings = subject.settings
    with (
        build.ready_step(subject, subject.recorded_kernels(), chunk_share=chunk_share) as step,
        build.make_loader(rows, settings, num_rows=settings.rows_per_step, seed=seed) as loader,
    ):
        yield ProfiledSteps(subject, step, loader, phases)


def logits_bytes(subject: build.Subject) -> int:
    """Return the bytes that head and loss take beyond their inputs and gradients, by running them alone.

    Args:
        subject: the model, which is not changed, and its settings.
    """
    model, settings, vocab_size = subject.model, subject.settings, subject.vocab_size
    head = find_head(model, vocab_size)
    tokens = settings.batch_size * subject.context_length
    if head is None:
        weights = tree_flatten(model.parameters())
        return 2 * tokens * vocab_size * int(weights[0][1].itemsize)
    dtype = dtype_of(settings)
    weight = head.weight(model, dtype)
    hidden = mx.zeros((tokens, weight.shape[-1]), dtype)
    targets, ones = mx.zeros((tokens,), mx.int32), mx.ones((tokens,))

    def loss(hidden: mx.array, weight: mx.array) -> mx.array:
        if not settings.fused_loss:
            return (cross_entropy(hidden @ weight.T, targets) * ones).sum()
        return linear_cross_entropy(
            hidden, weight, targets, ones, chunk_rows=chunk_rows(vocab_size), trains_weight=True
        )

    mx.eval(hidden, weight, targets, ones)
    before = mx.get_active_memory()
    with phase_peaks.followed() as peak:
        compute = mx.compile(mx.value_and_grad(loss, argnums=(0, 1)))
        result = compute(hidden, weight)
        mx.eval(result)
    return max(0, peak.bytes - before - num_bytes(result[1]))
