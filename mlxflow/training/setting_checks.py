"""Checks of a `[train]` table for contradicting settings, made when the workflow is read; imports no MLX."""

from collections.abc import Iterator
from typing import Any

from mlxflow.messages.errors import WorkflowError
from mlxflow.storage.toml_tables import Problem
from mlxflow.training import table_settings


def step_problems(config: Any) -> Iterator[Problem]:
    """Yield numbers of steps and rows that contradict each other.

    Args:
        config: a `[train]` table.
    """
    if config.grow_below >= config.shrink_above:
        expected = f"expected less than shrink_above = {config.shrink_above}"
        yield Problem("grow_below", config.grow_below, expected, "Change one of the two.")
    if table_settings.max_batch_size(config) < config.batch_size:
        expected = f"expected at least batch_size = {config.batch_size}"
        advice = f"Set it to {config.batch_size} or remove it."
        yield Problem("max_batch_size", config.max_batch_size, expected, advice)
    if config.num_steps != "auto":
        yield from schedule_problems(config, config.num_steps, f"num_steps = {config.num_steps}")
    if config.patience and not config.eval_every:
        expected = "needs validations on the way, and eval_every = 0 makes none"
        yield Problem("patience", config.patience, expected, "Set eval_every, or remove patience.")


def schedule_problems(config: Any, num_steps: int, shown: str) -> Iterator[Problem]:
    """Yield warm-up and decay that do not fit into the steps of a training.

    Args:
        config: a `[train]` table.
        num_steps: of the training.
        shown: the key that says so, with its value.
    """
    warmup_steps = table_settings.warmup_steps(config, num_steps)
    if warmup_steps >= num_steps:
        yield Problem("warmup_steps", warmup_steps, f"expected less than {shown}", "Lower it or remove the key.")
    elif config.schedule == "wsd" and config.decay_steps != "auto":
        room = num_steps - warmup_steps
        if config.decay_steps > room:
            left = "num_steps - warmup_steps =" if config.num_steps != "auto" else f"of {shown}, after the warm-up,"
            yield Problem(
                "decay_steps", config.decay_steps, f"expected at most {left} {room}", "Lower it or remove the key."
            )


def require_fitting_steps(config: Any, num_steps: int, num_rows: int, *, table: str) -> None:
    """Make sure that warm-up and decay fit into steps that are known only now, because the table has epochs.

    Args:
        config: a `[train]` table.
        num_steps: that its epochs amount to.
        num_rows: of the training file.
        table: the stage's name, for the message.

    Raises:
        WorkflowError: they do not fit.
    """
    if config.num_steps != "auto":
        return
    shown = f"the {num_steps} steps of num_epochs = {config.num_epochs:g} on {num_rows} rows"
    lines = [
        f"{table}.{one.key} = {one.value}: {one.expected}. {one.advice}"
        for one in schedule_problems(config, num_steps, shown)
    ]
    if lines:
        raise WorkflowError(*lines)


def method_problems(config: Any) -> Iterator[Problem]:
    """Yield a method of training that contradicts the model or `fuse`.

    Args:
        config: a `[train]` table.
    """
    if config.method != "full" and not config.model.from_:
        expected = "adapters need a base model"
        yield Problem("method", config.method, expected, 'Set model.from, or method = "full".')
    if config.method == "full" and config.fuse != "auto":
        expected = 'method = "full" trains no adapters'
        yield Problem("fuse", config.fuse, expected, 'Remove the key, or set method = "lora".')
