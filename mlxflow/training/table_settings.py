"""The training settings of a `[train]` table, with every `auto` resolved; imports no MLX."""

from typing import Any

from mlxflow.training.optimizer_options import WITH_BETAS
from mlxflow.training.settings import Recomputation, TrainingSettings


def max_batch_size(config: Any) -> int:
    """Return the largest batch size of a `[train]` table, with `auto` resolved."""
    return max(64, config.batch_size) if config.max_batch_size == "auto" else int(config.max_batch_size)


def warmup_steps(config: Any, num_steps: int) -> int:
    """Return the number of warm-up steps, with `auto` resolved.

    Args:
        config: a `[train]` table.
        num_steps: of the training.
    """
    return min(20, num_steps // 2) if config.warmup_steps == "auto" else int(config.warmup_steps)


def decay_steps(config: Any, num_steps: int) -> int:
    """Return the number of decay steps of the schedule "wsd", with `auto` resolved.

    Args:
        config: a `[train]` table.
        num_steps: of the training.
    """
    return max(1, num_steps // 5) if config.decay_steps == "auto" else int(config.decay_steps)


def most_ranks(config: Any) -> int:
    """Return the most processes that can share an update: each has a forward pass or, if they may be split, a row.

    Args:
        config: a `[train]` table.
    """
    if config.dynamic_batch_size and config.constant_tokens_per_step:
        return int(config.batch_size * config.grad_accum_steps)
    return int(config.grad_accum_steps)


def trains_adapters(config: Any) -> bool:
    """Return whether adapters are trained beside frozen weights.

    Args:
        config: a `[train]` table.
    """
    return config.lora.shape(config.method) is not None


def training_settings(config: Any, num_steps: int) -> TrainingSettings:
    """Return the settings of a table, resolved except for those that depend on the model.

    Document mask, fused loss and kernels are off.

    Args:
        config: a `[train]` table.
        num_steps: of the training, see `length.planned_steps`.
    """
    same = {name: getattr(config, name) for name in TrainingSettings.__struct_fields__ if hasattr(config, name)}
    betas = {"betas": list(config.betas)} if config.optimizer in WITH_BETAS else {}
    resolved = {
        "adapters": config.lora.shape(config.method) or "none",
        "max_batch_size": max_batch_size(config),
        "optimizer_options": betas | config.optimizer_options,
        "weight_decay": 0.1 if config.weight_decay == "auto" else config.weight_decay,
        "num_steps": num_steps,
        "warmup_steps": warmup_steps(config, num_steps),
        "decay_steps": decay_steps(config, num_steps),
        "checkpoint_every": Recomputation.of(config.checkpointing).every,
        "checkpoint_segment": Recomputation.of(config.checkpointing).segment,
        "fused_loss": False,
        "kernels": (),
    }
    return TrainingSettings(**(same | resolved))
