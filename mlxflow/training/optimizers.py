"""Optimizers of `mlx.optimizers` by name, and learning rate schedules."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlxflow.messages.errors import ArtifactError
from mlxflow.ops import compiled_numbers

#: Takes the number of the update, from 0, and returns the learning rate, a scalar.
Schedule = Callable[[mx.array], mx.array]


def make_schedule(
    *, name: str, learning_rate: float, final_learning_rate: float, num_steps: int, warmup_steps: int, decay_steps: int
) -> Schedule:
    """Return the learning rate as a function of the step.

    It rises linearly from 0 over the warm-up. Then "constant" keeps it, "linear" and "cosine" decay, and "wsd"
    (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395) keeps it and decays linearly over the last
    `decay_steps`. Decay reaches `final_learning_rate` after the last step: with 0 the last update still moves weights.

    Args:
        name: one of those four.
        learning_rate: the highest.
        final_learning_rate: after the last step, for schedules that decay.
        num_steps: updates in all.
        warmup_steps: length of the warm-up.
        decay_steps: length of the decay of "wsd"; others ignore it.
    """
    begin = {"wsd": max(warmup_steps, num_steps - decay_steps)}.get(name, warmup_steps)
    length = max(1, num_steps - begin)

    def schedule(step: mx.array) -> mx.array:
        highest, final, fall, begin_at, decay, warmup, rise = compiled_numbers.as_arrays(
            learning_rate,
            final_learning_rate,
            learning_rate - final_learning_rate,
            begin,
            length,
            warmup_steps,
            warmup_steps + 1,
        )
        at = step.astype(mx.float32)
        done = mx.clip((at - begin_at) / decay, 0.0, 1.0)
        if name == "constant":
            left = mx.array(1.0)
        elif name == "cosine":
            left = 0.5 * (1 + mx.cos(mx.pi * done))
        else:
            left = 1 - done
        return mx.where(at < warmup, highest * (at + 1) / rise, final + fall * left)

    return schedule


def options_of(name: str) -> dict[str, Any]:
    """Return the options of an optimizer with their defaults, the learning rate left out.

    Args:
        name: a class of `mlx.optimizers`, in lower case.
    """
    parameters = inspect.signature(_class_of(name).__init__).parameters.values()
    return {
        parameter.name: parameter.default for parameter in parameters if parameter.name not in ("self", "learning_rate")
    }


def require_known(name: str, options: Iterable[str], *, reserved: Iterable[str], key: str) -> None:
    """Check the names of an optimizer's options.

    Args:
        name: of the optimizer.
        options: their names.
        reserved: names of options that have settings of their own.
        key: of the table of options, for the message.

    Raises:
        ArtifactError: the optimizer does not know one of them.
    """
    known = options_of(name)
    for option in options:
        if option not in known or option in reserved:
            others = sorted(set(known) - {"weight_decay", "betas"})
            raise ArtifactError(f"{key}.{option}: unknown to {name}. Known: {', '.join(others)}.")


def _class_of(name: str) -> type[optim.Optimizer]:
    known: dict[str, type[optim.Optimizer]] = {
        key.lower(): value
        for key, value in vars(optim).items()
        if isinstance(value, type) and issubclass(value, optim.Optimizer)
    }
    return known[name]


def make_optimizer(
    *, name: str, schedule: Schedule, weight_decay: float, options: Mapping[str, Any]
) -> optim.Optimizer:
    """Return an optimizer that applies weight decay to matrices only, not to norms and biases.

    Args:
        name: a class of `mlx.optimizers`, in lower case.
        schedule: the learning rate.
        weight_decay: of matrices; ignored by optimizers without weight decay.
        options: others of its options, by name.
    """
    optimizer_class = _class_of(name)
    kind: dict[str, Any] = dict(options)
    if name == "adafactor":
        kind = {"relative_step": False, "scale_parameter": False} | kind
    if "weight_decay" not in options_of(name):
        return optimizer_class(learning_rate=schedule, **kind)
    decayed = optimizer_class(learning_rate=schedule, weight_decay=weight_decay, **kind)
    spared = optimizer_class(learning_rate=schedule, weight_decay=0.0, **kind)
    return optim.MultiOptimizer([decayed, spared], [lambda path, weight: weight.ndim > 1])
