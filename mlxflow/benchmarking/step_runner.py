"""Training steps done by a recipe, a few at a time: what is timed, and what loss they reach."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Self, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlxflow.benchmarking.recipe import Job, Recipe
from mlxflow.benchmarking.unpacked_rows import InlineLoader
from mlxflow.data.loader import DeviceBatch, Loader
from mlxflow.data.token_file import Rows
from mlxflow.kernels import model_kernels
from mlxflow.ops import document_mask
from mlxflow.ops.gradient_checkpointing import recomputed
from mlxflow.ops.overrides import Arithmetic, own_arithmetic
from mlxflow.training.adapters import AdapterShape, ensure_adapters
from mlxflow.training.objective import Objective, chunk_rows, fused_objective, plain_objective
from mlxflow.training.optimizers import Update, make_optimizer
from mlxflow.training.output_head import find_head
from mlxflow.training.step import Step

# Takes tokens and marks, updates the model, returns the mean loss; all lazy
_Advance = Callable[[mx.array, mx.array], mx.array]


class Parts(NamedTuple):
    """Where the seconds of one step went, the host waiting for the device before it goes on.

    Attributes:
        data: until the batch was there.
        graph: until the host had built the graph of what to compute.
        compute: until the results were there. To send a graph is a part of it: how long that takes cannot be told from
            waiting, as MLX lets the host send so much at a time only.
        synchronize: until the buffers behind them were given back.
    """

    data: float
    graph: float
    compute: float
    synchronize: float


class Runner:
    """A model in training by a recipe. Made by `running`.

    Attributes:
        targets: tokens learnt from so far.
        waited_seconds: until batches were there, so far.
    """

    def __init__(self, advance: _Advance, state: Any, loader: Iterator[DeviceBatch], *, runs_ahead: bool) -> None:
        self.targets = 0
        self.waited_seconds = 0.0
        self._advance = advance
        self._state = state
        self._loader = loader
        self._runs_ahead = runs_ahead

    def run(self, num_steps: int) -> list[float]:
        """Do some steps, wait for them, and return the mean loss of each in nats."""
        losses: list[mx.array] = []
        for number in range(num_steps):
            losses.append(self._send())
            if not self._runs_ahead:
                mx.eval(losses[-1], self._state)
            elif number:
                mx.eval(losses[-2])  # one stays on the device, which is not left idle
        mx.eval(losses, self._state)
        mx.synchronize()
        return [float(loss) for loss in losses]

    def _send(self) -> mx.array:
        batch = self._next()
        loss = self._advance(batch.tokens, batch.marks)
        if self._runs_ahead:
            mx.async_eval(loss, self._state)
        return loss

    def _next(self) -> DeviceBatch:
        begin = time.perf_counter()
        batch = next(self._loader)
        self.waited_seconds += time.perf_counter() - begin
        self.targets += batch.targets
        return batch

    def take_apart(self) -> Parts:
        """Do one step, waiting for each part of it."""
        begin = time.perf_counter()
        batch = self._next()
        loaded = time.perf_counter()
        loss = self._advance(batch.tokens, batch.marks)
        told = time.perf_counter()
        mx.eval(loss, self._state)
        there = time.perf_counter()
        mx.synchronize()
        return Parts(loaded - begin, told - loaded, there - told, time.perf_counter() - there)

    @classmethod
    @contextmanager
    def running(
        cls, model: nn.Module, rows: Rows, *, recipe: Recipe, job: Job, vocab_size: int, warmup_steps: int, seed: int
    ) -> Iterator[Self]:
        """Give a runner of a recipe, until the block ends.

        Args:
            model: dense, or with adapters where such are trained; changed by every step.
            rows: packed, or of one piece each, as the recipe says.
            recipe: how a step is done.
            job: what is done.
            vocab_size: V.
            warmup_steps: over which the learning rate rises to the job's.
            seed: of the order of the rows, and of adapters.
        """
        with ExitStack() as held:
            if job.lora is not None:
                shape = AdapterShape(**{**job.lora, "keys": tuple(job.lora["keys"])})
                ensure_adapters(model, shape, seed=seed, key="train.lora.keys")
            model.set_dtype(mx.float32 if recipe.precision == "fp32" else mx.bfloat16)
            model.train()
            mx.eval(model.parameters())
            held.enter_context(recomputed(model, every=recipe.checkpoint_every))
            served = model_kernels.recorded_for(
                model,
                precision=recipe.precision,
                names=recipe.kernels,
                context_length=rows.tokens.shape[1] - 1,
                masks_documents=job.masks_documents,
            )
            held.enter_context(served.fitted())
            objective = _objective(model, recipe, job, vocab_size, uses_kernel=served.serves_loss)
            advance, state = _advance(model, objective, recipe, job, warmup_steps, served)
            loader = held.enter_context(_loading(rows, recipe, seed))
            yield cls(advance, state, loader, runs_ahead=recipe.runs_ahead)


@contextmanager
def _loading(rows: Rows, recipe: Recipe, seed: int) -> Iterator[Iterator[DeviceBatch]]:
    if not recipe.prefetch_batches:
        yield InlineLoader(rows, batch_size=recipe.batch_size, seed=seed, trims=recipe.is_trimmed)
        return
    with Loader(
        rows,
        batch_size=recipe.batch_size,
        seed=seed,
        workers=recipe.workers,
        prefetch_batches=recipe.prefetch_batches,
    ) as loader:
        yield loader


def _objective(model: nn.Module, recipe: Recipe, job: Job, vocab_size: int, *, uses_kernel: bool) -> Objective:
    masks = job.masks_documents and recipe.is_packed  # alone in its row, a document needs no mask
    head = find_head(model, vocab_size) if recipe.loss == "fused" else None
    if head is not None:
        chunk = chunk_rows(vocab_size)
        return fused_objective(head, masks_documents=masks, chunk_rows=chunk, uses_kernel=uses_kernel)
    if recipe.loss == "plain":
        return _mlx_objective(masks)
    return plain_objective(masks_documents=masks, uses_kernel=uses_kernel)


def _mlx_objective(masks: bool) -> Objective:
    """Return the objective with MLX's own cross-entropy of all logits."""

    def objective(model: nn.Module, tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        weights = (marks[:, 1:] & 1).astype(mx.float32)
        logits = document_mask.apply(model, tokens[:, :-1], marks[:, :-1] if masks else None).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, tokens[:, 1:], weights=weights, reduction="sum")
        return losses, weights.sum()

    return objective


def _advance(
    model: nn.Module,
    objective: Objective,
    recipe: Recipe,
    job: Job,
    warmup_steps: int,
    served: model_kernels.Serving,
) -> tuple[_Advance, list[Any]]:
    """Return a step of a recipe, and all that it changes."""
    arithmetic = Arithmetic(recipe.does_own_arithmetic, recipe.is_deterministic, served.attention)
    optimizer = make_optimizer(
        name=job.optimizer,
        schedule=lambda step: job.learning_rate * mx.minimum(1.0, (step + 1) / max(1, warmup_steps)),
        weight_decay=job.weight_decay,
        options=job.options,
    )
    update: Callable[[mx.array, mx.array, Any], mx.array]
    if recipe.joins_updates:
        joined = Update(
            model,
            optimizer,
            max_grad_norm=job.max_grad_norm,
            has_masters=recipe.precision == "bf16",
            serves=served.serves,
        )
        if recipe.is_compiled:
            step = Step(model, joined, objective, arithmetic=arithmetic)
            return lambda tokens, marks: step.update(step.compute(tokens, marks)).loss, step.state
        update, updated = (lambda total, count, tree: joined(total, count, tree)[0]), joined.state
    else:
        optimizer.init(model.trainable_parameters())
        update, updated = _plain_update(model, optimizer, job.max_grad_norm), optimizer.state
    state = [model.state, updated, mx.random.state]
    advance = _plain_step(model, objective, update, arithmetic)
    if recipe.is_compiled:
        advance = cast("_Advance", mx.compile(advance, inputs=state, outputs=state))
    return advance, state


def _plain_step(
    model: nn.Module,
    objective: Objective,
    update: Callable[[mx.array, mx.array, Any], mx.array],
    arithmetic: Arithmetic,
) -> _Advance:
    def loss(weights: Any, tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        model.update(weights)
        return objective(model, tokens, marks)

    def advance(tokens: mx.array, marks: mx.array) -> mx.array:
        weights = model.trainable_parameters()
        with own_arithmetic(model, tokens, arithmetic):
            (total, count), tree = mx.value_and_grad(loss)(weights, tokens, marks)
        model.update(weights)  # not those that the transformation put in their place
        return update(total, count, tree)

    return advance


def _plain_update(
    model: nn.Module, optimizer: optim.Optimizer, max_grad_norm: float
) -> Callable[[mx.array, mx.array, Any], mx.array]:
    """Return an update as MLX's documentation writes it: the optimizer goes over the weights one by one."""

    def update(total: mx.array, count: mx.array, tree: Any) -> mx.array:
        count = mx.maximum(count, 1.0)
        gradients = tree_map(lambda gradient: (gradient / count).astype(gradient.dtype), tree)
        if max_grad_norm:
            gradients, _ = optim.clip_grad_norm(gradients, max_grad_norm)
        optimizer.update(model, gradients)
        return total / count

    return update
