"""One optimizer update, compiled as a whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlxflow.data.loader import Loader
from mlxflow.data.token_file import Rows
from mlxflow.training.loss import next_token_loss

#: Takes the tokens and marks of a batch, (B, L + 1) each, updates the model, returns the loss and the gradient's norm,
#: both lazy.
Step = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]

#: Takes the number of the update, from 0, and returns the learning rate.
Schedule = Callable[[mx.array], mx.array]


def warmup_cosine(*, learning_rate: float, num_steps: int, warmup_steps: int) -> Schedule:
    """Return a learning rate that rises linearly over `warmup_steps` and falls along a cosine to nothing."""
    decay_steps = max(1, num_steps - warmup_steps)
    cosine: Schedule = optim.schedulers.cosine_decay(learning_rate, decay_steps)
    if warmup_steps == 0:
        return cosine
    warmup = optim.schedulers.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    joined: Schedule = optim.schedulers.join_schedules([warmup, cosine], [warmup_steps])
    return joined


def compile_step(
    model: nn.Module, optimizer: optim.Optimizer, *, max_grad_norm: float, masks_documents: bool
) -> tuple[Step, list[Any]]:
    """Return the compiled update and the state that it changes in place.

    Args:
        model: in training mode.
        optimizer: initialized with the model's trainable parameters.
        max_grad_norm: gradients of a larger global norm are scaled down to it.
        masks_documents: no token attends to another document in its row.

    Returns:
        step: see `Step`.
        state: what to evaluate with the loss: parameters, optimizer state, random state.
    """
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_gradients = nn.value_and_grad(model, partial(next_token_loss, masks_documents=masks_documents))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        loss, gradients = loss_and_gradients(model, tokens, marks)
        gradients, norm = optim.clip_grad_norm(gradients, max_grad_norm)
        optimizer.update(model, gradients)
        return loss, norm

    return step, state


@contextmanager
def steps_on(
    model: nn.Module, rows: Rows, *, batch_size: int, masks_documents: bool, seed: int
) -> Iterator[Callable[[], int]]:
    """Give a function that trains a model one step further on rows of tokens and waits for the result.

    For measurements: AdamW at a small constant learning rate, everything else as in training. The function returns how
    many tokens it has trained on.

    Args:
        model: changed by every call.
        rows: at least one batch of them.
        batch_size: rows a step, B.
        masks_documents: no token attends to another document in its row.
        seed: of the order of the rows.
    """
    model.train()
    optimizer = optim.AdamW(learning_rate=1e-5)
    optimizer.init(model.trainable_parameters())
    compiled, state = compile_step(model, optimizer, max_grad_norm=1.0, masks_documents=masks_documents)
    with Loader(rows, batch_size=batch_size, seed=seed, workers=2, prefetch_batches=4) as loader:

        def step() -> int:
            batch = next(loader)
            mx.eval(*compiled(batch.tokens, batch.marks), state)
            return batch.targets

        yield step
