"""Defaults of a `[train]` table that depend on its other keys; imports no MLX.

A new model is trained for a number of steps at a high learning rate. A pretrained one is fine-tuned: fewer rows an
update, a learning rate that keeps what it knows, and passes over the data instead of steps. The learning rates were
measured on SmolLM2-135M with small sets of chats and of texts, see `docs/explanations/training.md`.
"""

from typing import Any, Literal, NamedTuple

from mlxflow.training.length import default_batch_size, updates_may_grow

Auto = Literal["auto"]

#: Positions of a row: for a new model, and the most for one that exists.
NEW_CONTEXT_LENGTH, PRETRAINED_CONTEXT_LENGTH = 64, 1024

#: Optimizer updates of a new model, passes over the data of one that exists.
NEW_STEPS, PRETRAINED_EPOCHS = 240, 3.0

#: Learning rate of a new model, of all weights of one that exists, and of adapters beside it.
NEW_RATE, FULL_RATE, ADAPTER_RATE = 1.5e-2, 3e-5, 1e-4


class Defaults(NamedTuple):
    """The values of keys that are not written.

    Attributes:
        learning_rate: the highest.
        batch_size: rows in one forward pass.
        num_steps: optimizer updates; "auto" where epochs decide.
        num_epochs: passes over the training rows; "auto" where steps decide.
    """

    learning_rate: float
    batch_size: int
    num_steps: int | Auto
    num_epochs: float | Auto


def defaults_of(config: Any) -> Defaults:
    """Return the defaults that fit the method and the model's origin.

    Args:
        config: a `[train]` table.
    """
    rows = default_batch_size(config)
    if not config.model.from_:
        return Defaults(NEW_RATE, rows, NEW_STEPS, "auto")
    rate = FULL_RATE if config.method == "full" else ADAPTER_RATE
    if updates_may_grow(config):
        return Defaults(rate, rows, NEW_STEPS, "auto")
    return Defaults(rate, rows, "auto", PRETRAINED_EPOCHS)


def resolved_values(config: Any) -> dict[str, Any]:
    """Return the values of the keys that are "auto", by key; steps or epochs that are written decide over the other.

    Args:
        config: a `[train]` table.
    """
    found = defaults_of(config)
    values = {key: getattr(found, key) for key in ("learning_rate", "batch_size") if getattr(config, key) == "auto"}
    if config.num_steps == "auto" and config.num_epochs == "auto":
        values |= {"num_steps": found.num_steps, "num_epochs": found.num_epochs}
    return values
