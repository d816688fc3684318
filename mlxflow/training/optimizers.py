"""Every optimizer of `mlx.optimizers` by its name, and the learning rate over the steps."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from mlxflow.errors import ArtifactError
from mlxflow.training.flat_parameters import FlatLayout, sum_of_squares

#: Takes the number of the update, from 0, and returns the learning rate.
Schedule = Callable[[mx.array], mx.array]


def make_schedule(
    *, name: str, learning_rate: float, final_learning_rate: float, num_steps: int, warmup_steps: int, decay_steps: int
) -> Schedule:
    """Return the learning rate as a function of the step.

    It rises linearly from nothing over the warm-up. Then: "constant" stays; "linear" and "cosine" fall; "wsd"
    (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395) stays and falls linearly over the last `decay_steps`.
    What falls reaches `final_learning_rate` after the last step, so that with 0 the last update still moves weights.

    Args:
        name: one of those four.
        learning_rate: at its highest.
        final_learning_rate: after the last step, where it falls.
        num_steps: updates in all.
        warmup_steps: the first of them.
        decay_steps: the last of them; only "wsd" looks at it.
    """
    begin = {"wsd": max(warmup_steps, num_steps - decay_steps)}.get(name, warmup_steps)
    length = max(1, num_steps - begin)

    def schedule(step: mx.array) -> mx.array:
        at = step.astype(mx.float32)
        done = mx.clip((at - begin) / length, 0.0, 1.0)
        if name == "constant":
            left = mx.array(1.0)
        elif name == "cosine":
            left = 0.5 * (1 + mx.cos(mx.pi * done))
        else:
            left = 1 - done
        rate = final_learning_rate + (learning_rate - final_learning_rate) * left
        return mx.where(at < warmup_steps, learning_rate * (at + 1) / (warmup_steps + 1), rate)

    return schedule


def options_of(name: str) -> dict[str, Any]:
    """Return the options of an optimizer with their defaults, the learning rate left out.

    Args:
        name: of a class of `mlx.optimizers`, in small letters.
    """
    parameters = inspect.signature(_class_of(name).__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.name not in ("self", "learning_rate")}


def require_known(name: str, options: Iterable[str], *, reserved: Iterable[str], key: str) -> None:
    """Check the names of an optimizer's options.

    Args:
        name: of the optimizer.
        options: their names.
        reserved: names that are set elsewhere.
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
    """Return an optimizer in which weight decay spares norms and biases, that is all vectors.

    Args:
        name: of a class of `mlx.optimizers`, in small letters.
        schedule: the learning rate.
        weight_decay: of matrices; 0 for an optimizer that knows none.
        options: others of its options, by name.
    """
    made = _class_of(name)
    kind: dict[str, Any] = dict(options)
    if name == "adafactor":
        kind = {"relative_step": False, "scale_parameter": False} | kind
    if "weight_decay" not in options_of(name):
        return made(learning_rate=schedule, **kind)
    decayed = made(learning_rate=schedule, weight_decay=weight_decay, **kind)
    spared = made(learning_rate=schedule, weight_decay=0.0, **kind)
    return optim.MultiOptimizer([decayed, spared], [lambda path, weight: weight.ndim > 1])


class Update:
    """One optimizer step on a model, from a sum of gradients.

    Losses and norms are summed in fp32. Where `has_masters` the optimizer works on fp32 copies of the trainable
    weights and keeps its moments in fp32; the model gets the rounded values. A step whose loss or gradient is not
    finite changes nothing at all. An optimizer that treats every number by itself works on all matrices at once and
    on all vectors at once; the model's weights are then views of what it wrote.

    Args:
        model: its trainable parameters are updated.
        optimizer: not yet initialized.
        max_grad_norm: gradients of a larger global norm are scaled down to it; 0 for none, and then the norm is not
            measured: the loss alone tells whether a step is finite.
        has_masters: whether fp32 copies are kept of weights in another type.
        uses_kernel: returns whether the kernel of a name is used.

    Attributes:
        state: what it changes beside the model: a tree to capture, save and restore. The model's trainable weights
            follow from it: `publish` puts them there.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        max_grad_norm: float,
        has_masters: bool,
        uses_kernel: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._uses_kernel = uses_kernel
        trainable = model.trainable_parameters()
        self._types = _map(lambda weight: weight.dtype, trainable)
        types = {dtype for _, dtype in tree_flatten(self._types)}
        self._model_type = types.pop() if len(types) == 1 else None
        if has_masters:
            trainable = _map(lambda weight: weight.astype(mx.float32), trainable)
        self._layout = FlatLayout(trainable) if _is_elementwise(optimizer) else None
        weights = self._gathered(trainable)
        optimizer.init(weights)
        self.state: dict[str, Any] = {"weights": weights, "optimizer": optimizer.state}
        self.publish()

    def publish(self) -> None:
        """Give the model the weights of the state."""
        weights = self.state["weights"]
        self._publish_arrays(weights)

    def _publish_arrays(self, arrays: Any) -> None:
        tree = arrays if self._layout is None else self._layout.scatter(arrays)
        self._model.update(_map(lambda weight, dtype: weight.astype(dtype), tree, self._types))

    def __call__(
        self, total: mx.array, count: mx.array, gradients: Any
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Update the model; return the mean loss, the gradient's norm, the learning rate, and whether both were finite.

        Args:
            total: sum of the losses.
            count: tokens in the sum.
            gradients: tree of the sum's gradients; any type.
        """
        count = mx.maximum(count, 1.0)
        loss = total / count
        weights, gradients = self.state["weights"], self._gathered(gradients)
        norm, scale = mx.array(0.0), 1 / count
        if self._max_grad_norm:
            norm = mx.sqrt(_sum([self._squares(gradient) for _, gradient in tree_flatten(gradients)])) / count
            scale = mx.minimum(self._max_grad_norm / (norm + 1e-6), 1.0) / count
        is_finite = mx.isfinite(loss) & mx.isfinite(norm)
        if self._is_fused(weights, gradients):
            return loss, norm, self._apply_fused(weights, gradients, scale, is_finite), is_finite
        scaled = _map(lambda weight, gradient: _scaled(gradient, scale, weight.dtype), weights, gradients)
        before = tree_map(lambda leaf: leaf, self._optimizer.state)
        updated = self._optimizer.apply_gradients(scaled, weights)
        rate = self._optimizer.learning_rate
        _keep_where(is_finite, self._optimizer.state, before)
        self.state["weights"] = _map(lambda old, new: mx.where(is_finite, new.astype(old.dtype), old), weights, updated)
        self.publish()
        return loss, norm, rate, is_finite

    def _is_fused(self, weights: Any, gradients: Any) -> bool:
        """Return whether the update is AdamW's, on long arrays, all of which the kernel takes."""
        parts = getattr(self._optimizer, "optimizers", [self._optimizer])
        if (
            self._layout is None
            or self._model_type is None
            or any(type(part) not in (optim.AdamW, optim.Adam) for part in parts)
        ):
            return False
        names = {_kernel_name(weights[name].dtype, gradients[name].dtype) for name in weights}
        return all(self._uses_kernel(name) for name in names) and all(weights[name].size >= 8 for name in weights)

    def _apply_fused(self, weights: Any, gradients: Any, scale: mx.array, is_finite: mx.array) -> mx.array:
        """Update by one launch for each long array; return the learning rate."""
        from mlxflow.training import fused_adamw

        parts = getattr(self._optimizer, "optimizers", [self._optimizer])
        rate = mx.array(0.0)
        rounded: dict[str, mx.array] = {}
        for part in parts:
            part_rate, made = fused_adamw.apply(
                part,
                weights,
                gradients,
                scale=scale,
                is_finite=is_finite,
                model_type=self._model_type,
            )
            rate = part_rate if part is parts[0] else rate
            rounded |= made
        self._publish_arrays(rounded)
        return rate

    def _squares(self, gradient: mx.array) -> mx.array:
        name = f"sum_of_squares/{str(gradient.dtype).rpartition('.')[2]}"
        if not self._uses_kernel(name):
            return sum_of_squares(gradient)
        from mlxflow.kernels import adamw

        return adamw.kernel_sum_of_squares(gradient)

    def _gathered(self, tree: Any) -> Any:
        return tree if self._layout is None else self._layout.gather(tree)


def _kernel_name(*types: mx.Dtype) -> str:
    return "/".join(["adamw", *(str(dtype).rpartition(".")[2] for dtype in types)])


def _is_elementwise(optimizer: optim.Optimizer) -> bool:
    """Return whether what becomes of a number depends on that number's own gradients alone."""
    if isinstance(optimizer, optim.MultiOptimizer):
        return all(_is_elementwise(one) for one in optimizer.optimizers)
    known = (optim.SGD, optim.RMSprop, optim.Adagrad, optim.AdaDelta, optim.Adam, optim.Adamax, optim.Lion)
    return isinstance(optimizer, known)


def _map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Return the first tree with each leaf replaced; the others may lack what is empty in it."""
    if isinstance(tree, dict):
        return {
            key: _map(function, value, *(other[key] for other in others)) if tree_flatten(value) else value
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [
            _map(function, value, *(other[place] for other in others)) if tree_flatten(value) else value
            for place, value in enumerate(tree)
        ]
    return function(tree, *others)


def _sum(scalars: list[mx.array]) -> mx.array:
    """Return a sum of scalars, by fused additions of a few at a time: a stack of them would be a copy for each."""
    while len(scalars) > 1:
        scalars = [functools.reduce(operator.add, scalars[begin : begin + 8]) for begin in range(0, len(scalars), 8)]
    return scalars[0]


def _scaled(gradient: mx.array, scale: mx.array, dtype: mx.Dtype) -> mx.array:
    # MLX fuses chains of eleven operations: an optimizer's own and as few of ours as can be
    if gradient.dtype == dtype:
        return gradient * scale.astype(dtype)
    return (gradient.astype(mx.float32) * scale).astype(dtype)


def _keep_where(condition: mx.array, state: Any, before: Any) -> None:
    """Put back, in place, what was before wherever a condition does not hold."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in list(items):
        if isinstance(value, dict | list):
            _keep_where(condition, value, before[key])
        else:
            state[key] = mx.where(condition, value, before[key])
