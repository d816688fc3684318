"""Checks of a `[train]` table for contradicting settings, made when the workflow is read; imports no MLX."""

from collections.abc import Iterator
from typing import Any

from mlxflow.storage.toml_tables import Problem


def step_problems(config: Any) -> Iterator[Problem]:
    """Yield numbers of steps and rows that contradict each other.

    Args:
        config: a `[train]` table.
    """
    if config.grow_below >= config.shrink_above:
        expected = f"expected less than shrink_above = {config.shrink_above}"
        yield Problem("grow_below", config.grow_below, expected, "Change one of the two.")
    if config.resolved_max_batch_size < config.batch_size:
        expected = f"expected at least batch_size = {config.batch_size}"
        advice = f"Set it to {config.batch_size} or remove it."
        yield Problem("max_batch_size", config.max_batch_size, expected, advice)
    if config.resolved_warmup_steps >= config.num_steps:
        expected = f"expected less than num_steps = {config.num_steps}"
        yield Problem("warmup_steps", config.warmup_steps, expected, "Lower it or remove the key.")
    elif config.schedule == "wsd" and config.decay_steps != "auto":
        room = config.num_steps - config.resolved_warmup_steps
        if config.decay_steps > room:
            expected = f"expected at most num_steps - warmup_steps = {room}"
            yield Problem("decay_steps", config.decay_steps, expected, "Lower it or remove the key.")
    if config.patience and not config.eval_every:
        expected = "needs validations on the way, and eval_every = 0 makes none"
        yield Problem("patience", config.patience, expected, "Set eval_every, or remove patience.")


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
