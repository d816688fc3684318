"""The training loop: steps, validation, and a record of both."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.data.loader import Loader
from mlxflow.data.token_file import Rows
from mlxflow.errors import StageError
from mlxflow.measurement.perplexity import measure_perplexity
from mlxflow.training.step import Step

#: Called with one record for each log line; the key "kind" is "train" or "validation".
Log = Callable[[dict[str, Any]], None]


class Result(NamedTuple):
    """What a training run came to."""

    tokens: int
    seconds: float
    first_validation_loss: float
    last_validation_loss: float


class _Clock:
    """Tokens a second of wall-clock time spent in training, validation left out."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._paused = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self._begin - self._paused

    def paused(self, work: Callable[[], float]) -> float:
        begin = time.perf_counter()
        result = work()
        self._paused += time.perf_counter() - begin
        return result


def train(
    *,
    model: nn.Module,
    step: Step,
    state: list[Any],
    loader: Loader,
    validation_rows: Rows,
    num_steps: int,
    log_every: int,
    eval_every: int,
    eval_batch_size: int,
    masks_documents: bool,
    learning_rate: Callable[[], mx.array],
    log: Log,
) -> Result:
    """Run a number of steps; the host builds the next step while the device computes this one.

    Args:
        model: the model that `step` updates.
        step: see `training.step.Step`.
        state: what `step` changes.
        loader: gives the batches.
        validation_rows: measured before the first step, every `eval_every` steps and after the last.
        num_steps: updates.
        log_every: steps between two records of kind "train".
        eval_every: steps between two records of kind "validation"; 0 for only the first and last.
        eval_batch_size: rows a forward pass in validation.
        masks_documents: in validation too, no token attends to another document in its row.
        learning_rate: reads the current one from the optimizer.
        log: takes each record.

    Raises:
        StageError: the loss is not finite; the message names the step and the learning rate.
    """
    clock = _Clock()
    tokens = 0

    def validate(number: int) -> float:
        measured = measure_perplexity(
            model, validation_rows, batch_size=eval_batch_size, masks_documents=masks_documents
        )
        log({"kind": "validation", "step": number, "loss": measured.loss, "perplexity": measured.perplexity})
        return measured.loss

    first = last = clock.paused(lambda: validate(0))
    for number in range(1, num_steps + 1):
        batch = next(loader)
        loss, norm = step(batch.tokens, batch.marks)
        mx.async_eval(loss, norm, state)
        tokens += batch.targets
        if number % log_every == 0 or number == num_steps:
            log(_record(number, loss, norm, learning_rate(), tokens, loader.waited_seconds, clock))
        if number == num_steps or (eval_every and number % eval_every == 0):
            last = clock.paused(lambda at=number: validate(at))  # type: ignore[misc]
    mx.eval(state)
    return Result(tokens, clock.seconds(), first, last)


def _record(
    number: int,
    loss: mx.array,
    norm: mx.array,
    learning_rate: mx.array,
    tokens: int,
    data_wait_seconds: float,
    clock: _Clock,
) -> dict[str, Any]:
    value, norm_value, rate = float(loss), float(norm), float(learning_rate)
    if value - value != 0:
        raise StageError(
            f"train: the loss is {value} at step {number} with learning rate {rate:.3g}. "
            "Lower train.learning_rate or train.max_grad_norm."
        )
    seconds = clock.seconds()
    return {
        "kind": "train",
        "step": number,
        "loss": value,
        "gradient_norm": norm_value,
        "learning_rate": rate,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "data_wait_seconds": data_wait_seconds,
        "active_memory_bytes": mx.get_active_memory(),
        "peak_memory_bytes": mx.get_peak_memory(),
    }
