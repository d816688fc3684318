"""The optimizers of MLX that can be chosen, the settings that each has, and values of its options; imports no MLX."""

from collections.abc import Iterator
from typing import Any, Literal

from mlxflow.storage.toml_tables import Problem

#: Classes of `mlx.optimizers`, in lower case.
Optimizer = Literal["adamw", "adam", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "lion", "adafactor", "muon"]

#: Optimizers without weight decay.
WITHOUT_DECAY = ("adam", "rmsprop", "adagrad", "adadelta", "adamax")

#: Optimizers with two moments.
WITH_BETAS = ("adamw", "adam", "adamax", "lion")

DEFAULT_BETAS = (0.9, 0.95)

_MAX_OPTION = 1_000_000


def optimizer_problems(config: Any) -> Iterator[Problem]:
    """Yield settings that an optimizer does not have, and values out of bounds.

    The names of `optimizer_options` are checked by `optimizers.require_known`.

    Args:
        config: a `[train]` table.
    """
    optimizer = config.optimizer
    if config.final_learning_rate > config.learning_rate:
        expected = f"expected at most learning_rate = {config.learning_rate}"
        yield Problem("final_learning_rate", config.final_learning_rate, expected, "Change one of the two.")
    if config.weight_decay not in ("auto", 0) and optimizer in WITHOUT_DECAY:
        expected = f"the optimizer {optimizer!r} knows none"
        yield Problem("weight_decay", config.weight_decay, expected, 'Set weight_decay = 0, or optimizer = "adamw".')
    if config.betas != DEFAULT_BETAS and optimizer not in WITH_BETAS:
        expected = f"the optimizer {optimizer!r} has none"
        yield Problem("betas", config.betas, expected, 'Remove the key, or set optimizer = "adamw".')
    for name, value in config.optimizer_options.items():
        if not all(_is_option(one) for one in (value if isinstance(value, list) else [value])):
            expected = f"expected true, false, a number from -{_MAX_OPTION} to {_MAX_OPTION}, or a list of such"
            yield Problem(f"optimizer_options.{name}", value, expected, "Change it or remove the key.")


def _is_option(value: object) -> bool:
    """Return whether a value can be one of an optimizer's options: true, false or a number within bounds."""
    return isinstance(value, bool | int | float) and -_MAX_OPTION <= value <= _MAX_OPTION  # never true of nan
