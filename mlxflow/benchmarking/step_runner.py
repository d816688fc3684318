"""Run training steps by a recipe, a few at a time, for timing and for loss curves."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlxflow.benchmarking.recipe import Recipe
from mlxflow.benchmarking.unpacked_rows import InlineLoader
from mlxflow.data.loader import DeviceBatch
from mlxflow.data.token_file import Rows
from mlxflow.ops import document_mask
from mlxflow.ops.overrides import OperationOverrides, replaced_operations
from mlxflow.training import build
from mlxflow.training.batch_size import split
from mlxflow.training.objective import Objective
from mlxflow.training.step import accumulate

# Takes a batch, updates the model, returns the mean loss; nothing is evaluated
_Advance = Callable[[DeviceBatch], mx.array]

# Takes the sum of the losses, the number of tokens and the sum of the gradients; returns the mean loss
_PlainUpdate = Callable[[mx.array, mx.array, Any], mx.array]


class Parts(NamedTuple):
    """The parts of one synchronous step, in seconds or as shares of it.

    Attributes:
        data: waiting for the batch.
        graph: building the graph on the host.
        compute: until the results are ready. Includes sending the graph, which cannot be separated from waiting since
            MLX limits how much the host may send ahead.
        synchronize: until the buffers are freed.
    """

    data: float
    graph: float
    compute: float
    synchronize: float

    def shares(self) -> "Parts":
        """Return each part as a share of the step."""
        return Parts(*(part / sum(self) for part in self))


class Runner:
    """A model in training by a recipe. Made by `running`.

    Attributes:
        targets: number of targets so far.
        waited_seconds: time spent waiting for batches so far.
    """

    def __init__(self, advance: _Advance, state: Any, loader: Iterator[DeviceBatch], *, runs_ahead: bool) -> None:
        self.targets = 0
        self.waited_seconds = 0.0
        self._advance = advance
        self._state = state
        self._loader = loader
        self._runs_ahead = runs_ahead

    def run(self, num_steps: int) -> list[float]:
        """Run steps, wait for them, and return the mean loss of each in nats per token."""
        losses: list[mx.array] = []
        for number in range(num_steps):
            losses.append(self._send())
            if not self._runs_ahead:
                mx.eval(losses[-1], self._state)
            elif number:
                mx.eval(losses[-2])  # one step stays queued, so that the device is not idle
        mx.eval(losses, self._state)
        mx.synchronize()
        return [float(loss) for loss in losses]

    def _send(self) -> mx.array:
        batch = self._next()
        loss = self._advance(batch)
        if self._runs_ahead:
            mx.async_eval(loss, self._state)
        return loss

    def _next(self) -> DeviceBatch:
        begin = time.perf_counter()
        batch = next(self._loader)
        self.waited_seconds += time.perf_counter() - begin
        self.targets += batch.targets
        return batch

    def time_parts(self) -> Parts:
        """Run one step, waiting for each part of it."""
        begin = time.perf_counter()
        batch = self._next()
        loaded = time.perf_counter()
        loss = self._advance(batch)
        built = time.perf_counter()
        mx.eval(loss, self._state)
        computed = time.perf_counter()
        mx.synchronize()
        return Parts(loaded - begin, built - loaded, computed - built, time.perf_counter() - computed)

    @classmethod
    @contextmanager
    def running(cls, subject: build.Subject, rows: Rows, *, recipe: Recipe, seed: int) -> Iterator[Self]:
        """Yield a runner of a recipe.

        Args:
            subject: the model, changed by every step, and its settings, which may differ from the recipe's only in the
                learning rate.
            rows: packed, or one piece of a document in each, by the recipe.
            recipe: how a step is done.
            seed: of the order of the rows.
        """
        with ExitStack() as held:
            if not recipe.is_packed:  # a document that is alone in its row needs no mask
                subject = subject._replace(settings=subject.settings.replace(masks_documents=False))
            kernels = subject.recorded_kernels()
            objective = _objective(subject, recipe, uses_kernel=kernels.uses_loss_kernel)
            held.enter_context(build.patched(subject, kernels))
            advance, state = _advance(subject, objective, recipe, kernels)
            loader = held.enter_context(_loading(rows, recipe, seed))
            yield cls(advance, state, loader, runs_ahead=recipe.runs_ahead)


@contextmanager
def _loading(rows: Rows, recipe: Recipe, seed: int) -> Iterator[Iterator[DeviceBatch]]:
    if not recipe.prefetches:
        trims = recipe.is_trimmed and not recipe.is_compiled  # MLX compiles a step for each width
        yield InlineLoader(rows, batch_size=recipe.rows_per_step, seed=seed, trims=trims)
        return
    with build.make_loader(rows, recipe.settings, num_rows=recipe.rows_per_step, seed=seed) as loader:
        yield loader


def _objective(subject: build.Subject, recipe: Recipe, *, uses_kernel: bool) -> Objective:
    if recipe.uses_mlx_loss:
        return _mlx_objective(subject.settings.masks_documents)
    return subject.objective(uses_kernel=uses_kernel)


def _mlx_objective(masks: bool) -> Objective:
    """Return the objective with MLX's own cross-entropy of all logits."""

    def objective(model: nn.Module, tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        weights = (marks[:, 1:] & 1).astype(mx.float32)
        logits = document_mask.apply(model, tokens[:, :-1], marks[:, :-1] if masks else None).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, tokens[:, 1:], weights=weights, reduction="sum")
        return losses, weights.sum()

    return objective


def _advance(
    subject: build.Subject, objective: Objective, recipe: Recipe, kernels: build.ModelKernels
) -> tuple[_Advance, list[Any]]:
    """Return a step of a recipe, and the state that it changes."""
    model, batch_size = subject.model, recipe.batch_size
    width = None if recipe.is_trimmed else subject.context_length
    if recipe.joins_updates and recipe.is_compiled:
        step = build.make_step(subject, objective, kernels, replaces_operations=recipe.replaces_operations)
        return (
            lambda batch: step.update(accumulate(step, batch, batch_size=batch_size, width=width)).loss,
            step.state,
        )
    update: _PlainUpdate
    if recipe.joins_updates:
        joined = build.make_update(subject, kernels)
        update, updated = (lambda total, count, tree: joined(total, count, joined.join(tree))[0]), joined.state
    else:
        optimizer = build.make_optimizer(subject.settings, names=subject.names)
        optimizer.init(model.trainable_parameters())
        update, updated = _plain_update(model, optimizer, subject.settings.max_grad_norm), optimizer.state
    state = [model.state, updated, mx.random.state]
    overrides = build.overrides_of(subject.settings, kernels)._replace(is_enabled=recipe.replaces_operations)
    advance: Callable[..., mx.array] = _plain_step(model, objective, update, overrides, batch_size=batch_size)
    if recipe.is_compiled:
        advance = cast("Callable[..., mx.array]", mx.compile(advance, inputs=state, outputs=state))
    return lambda batch: advance(*batch.part(0, len(batch.tokens), width=width)), state


def _plain_step(
    model: nn.Module, objective: Objective, update: _PlainUpdate, overrides: OperationOverrides, *, batch_size: int
) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a step without the compiled pieces of `training.step`; gradients of several passes are summed in fp32."""

    def loss(weights: Any, tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        model.update(weights)
        return objective(model, tokens, marks)

    def compute(tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array, Any]:
        weights = model.trainable_parameters()
        with replaced_operations(model, tokens, overrides):
            (total, count), tree = mx.value_and_grad(loss)(weights, tokens, marks)
        model.update(weights)  # undoes the transformation's replacement of the weights
        return total, count, tree

    def advance(tokens: mx.array, marks: mx.array) -> mx.array:
        total, count, tree = compute(tokens[:batch_size], marks[:batch_size])
        for begin, end in list(split(len(tokens), batch_size))[1:]:
            more_total, more_count, more = compute(tokens[begin:end], marks[begin:end])
            total, count = total + more_total, count + more_count
            tree = tree_map(lambda one, other: one.astype(mx.float32) + other.astype(mx.float32), tree, more)
        return update(total, count, tree)

    return advance


def _plain_update(model: nn.Module, optimizer: optim.Optimizer, max_grad_norm: float) -> _PlainUpdate:
    """Return an update as in MLX's documentation: the optimizer updates each weight by itself."""

    def update(total: mx.array, count: mx.array, tree: Any) -> mx.array:
        count = mx.maximum(count, 1.0)
        gradients = tree_map(lambda gradient: (gradient / count).astype(gradient.dtype), tree)
        if max_grad_norm:
            gradients, _ = optim.clip_grad_norm(gradients, max_grad_norm)
        optimizer.update(model, gradients)
        return total / count

    return update
