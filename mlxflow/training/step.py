"""One optimizer update, compiled as a whole."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlxflow.data.batches import batches
from mlxflow.training.loss import next_token_loss

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Takes a batch (B, L + 1) of token ids, updates the model, returns the loss and the gradient's norm, both lazy.
Step = Callable[[mx.array], tuple[mx.array, mx.array]]

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


def compile_step(model: nn.Module, optimizer: optim.Optimizer, *, max_grad_norm: float) -> tuple[Step, list[Any]]:
    """Return the compiled update and the state that it changes in place.

    Args:
        model: in training mode.
        optimizer: initialized with the model's trainable parameters.
        max_grad_norm: gradients of a larger global norm are scaled down to it.

    Returns:
        step: see `Step`.
        state: what to evaluate with the loss: parameters, optimizer state, random state.
    """
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_gradients = nn.value_and_grad(model, next_token_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array) -> tuple[mx.array, mx.array]:
        loss, gradients = loss_and_gradients(model, batch)
        gradients, norm = optim.clip_grad_norm(gradients, max_grad_norm)
        optimizer.update(model, gradients)
        return loss, norm

    return step, state


def steps_on(model: nn.Module, table: "NDArray[Any]", *, batch_size: int, seed: int) -> Callable[[], None]:
    """Return a function that trains a model one step further on rows of tokens and waits for the result.

    For measurements: AdamW at a small constant learning rate, everything else as in training.

    Args:
        model: changed by every call.
        table: (R, L + 1) rows of token ids, at least one batch.
        batch_size: rows a step, B.
        seed: of the order of the rows.
    """
    model.train()
    optimizer = optim.AdamW(learning_rate=1e-5)
    optimizer.init(model.trainable_parameters())
    compiled, state = compile_step(model, optimizer, max_grad_norm=1.0)
    drawn = batches(table, batch_size=batch_size, seed=seed)

    def step() -> None:
        mx.eval(*compiled(mx.array(next(drawn))), state)

    return step
