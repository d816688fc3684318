"""The optimizer's update of a model, on one process or on one of several ranks."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from mlxflow.distributed.team import SOLO, Team
from mlxflow.messages.errors import UserError
from mlxflow.ops import compiled_numbers
from mlxflow.training.flat_parameters import FlatLayout, is_split, sum_of_squares
from mlxflow.training.optimizer_shards import OptimizerShards
from mlxflow.training.sharded_layers import ShardedLayers


class Update:
    """One optimizer step on a model, from a sum of gradients.

    Losses and norms are summed in fp32. With `has_masters` the optimizer updates fp32 copies of the trainable weights
    and keeps its moments in fp32; the model gets the rounded values. A step whose loss or gradient is not finite
    changes nothing. An elementwise optimizer updates all matrices as one long array and all vectors as another; the
    model's weights are then views of them.

    Args:
        model: its trainable parameters are updated.
        optimizer: not yet initialized.
        max_grad_norm: gradients of a larger global norm are scaled down to it; 0 for no clipping. Then the norm is not
            computed, and only the loss is checked for finite values.
        has_masters: whether fp32 copies of weights in another dtype are kept.
        uses_kernel: takes the name of a kernel; returns whether it is used.
        team: the ranks of a distributed run; each may keep a part of the state.
        layers: of the model, split between the ranks; None if they are whole.

    Attributes:
        state: all that an update changes outside the model: a tree to capture, save and restore. `publish` computes
            the model's trainable weights from it.
        layout: of the long arrays; None without them.
        shards: the parts of the state that this rank keeps; None if it keeps all of it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        max_grad_norm: float,
        has_masters: bool,
        uses_kernel: Callable[[str], bool] = lambda _: False,
        team: Team = SOLO,
        layers: ShardedLayers | None = None,
    ) -> None:
        self.layers = layers
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
        apart = layers.paths if layers else frozenset[str]()
        self.layout = FlatLayout(trainable, apart=apart) if _is_elementwise(optimizer) else None
        if team.rank.shards_optimizer or layers:
            self._require_layout("sharding" if layers else "optimizer_sharding")
        weights = self.join(trainable)
        self.shards: OptimizerShards | None = None
        self._publish_arrays(weights)
        if team.rank.shards_optimizer:
            self.shards = OptimizerShards(weights, team)
            weights = self.shards.own(weights)
        optimizer.init(weights)
        self.state: dict[str, Any] = {"weights": weights, "optimizer": optimizer.state}

    def join(self, tree: Any) -> Any:
        """Return a tree like that of the trainable weights as the update takes gradients.

        For an elementwise optimizer: long arrays by name, see `FlatLayout`; the tree itself for others.
        """
        return tree if self.layout is None else self.layout.gather(tree)

    def _require_layout(self, key: str) -> None:
        if self.layout is None:
            kind = type(getattr(self._optimizer, "optimizers", [self._optimizer])[0]).__name__
            value = '"full"' if key == "sharding" else "true"
            raise UserError(
                f"{key} = {value}: {kind} updates whole matrices, which cannot be split between ranks. "
                "Remove it, or choose adamw or sgd as the optimizer."
            )

    def whole_state(self) -> Any:
        """Return the state with whole arrays for a checkpoint; of several ranks only rank 0 gets them."""
        if self.layers is not None and self.layout is not None:
            return self.layers.whole_state(self.state, self.layout)
        return self.state if self.shards is None else self.shards.whole_state(self.state)

    def state_like(self) -> Any:
        """Return a tree of the shapes and dtypes of `whole_state`, whose arrays may be replaced."""
        if self.layers is not None and self.layout is not None:
            return self.layers.state_like(self.state, self.layout)
        return self.state if self.shards is None else self.shards.state_like(self.state)

    def restore(self, state: Any) -> None:
        """Take whole arrays, as of `whole_state`, as the state; `publish` is called."""
        if self.shards is not None:
            _assign(self.state, self.shards.own_state(state))
        if self.layers is not None and self.layout is not None:
            _assign(self.state, self.layers.own_state(state, self.layout))
        self.publish()

    def shared_weights(self) -> Any:
        """Return a tree of weights that every rank has: those of the state, or else the model's."""
        if self.layers is not None:
            return {name: array for name, array in self.state["weights"].items() if not is_split(name)}
        return self.state["weights"] if self.shards is None else self._model.trainable_parameters()

    def publish(self) -> None:
        """Set the model's weights to those of the state."""
        self._publish_arrays(self.state["weights"])

    def _publish_arrays(self, arrays: Any) -> None:
        if self.shards is not None:  # in the dtype of the model, which may be half of the state's
            types = self._model_type
            arrays = {name: array if types is None else array.astype(types) for name, array in arrays.items()}
            arrays = self.shards.whole(arrays)
        tree = arrays if self.layout is None else self.layout.scatter(arrays)
        self._model.update(_map(lambda weight, dtype: weight.astype(dtype), tree, self._types))

    def __call__(
        self, total: mx.array, count: mx.array, gradients: Any
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Update the model; return the mean loss, the gradient norm, the learning rate, and whether both are finite.

        Args:
            total: sum of the losses in nats, a scalar.
            count: tokens in the sum, a scalar.
            gradients: of the sum, of any dtype, joined by `join`; a long array may be this rank's part of it.
        """
        count = mx.maximum(count, 1.0)
        loss = total / count
        weights = self.state["weights"]
        norm, scale = mx.array(0.0), 1 / count
        if self._max_grad_norm:
            norm = mx.sqrt(_sum(self._all_squares(gradients))) / count
            (most,) = compiled_numbers.as_arrays(self._max_grad_norm)
            scale = mx.minimum(most / (norm + 1e-6), 1.0) / count
        is_finite = mx.isfinite(loss) & mx.isfinite(norm)
        if self.shards is not None:
            gradients = self.shards.own(gradients)
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
        """Return whether the fused AdamW kernel supports the optimizer and all long arrays."""
        parts = getattr(self._optimizer, "optimizers", [self._optimizer])
        if (
            self.layout is None
            or self._model_type is None
            or any(type(part) not in (optim.AdamW, optim.Adam) for part in parts)
        ):
            return False
        names = {_kernel_name(weights[name].dtype, gradients[name].dtype) for name in weights}
        return all(self._uses_kernel(name) for name in names) and all(weights[name].size >= 8 for name in weights)

    def _apply_fused(self, weights: Any, gradients: Any, scale: mx.array, is_finite: mx.array) -> mx.array:
        """Update with one kernel launch per long array; return the learning rate."""
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

    def _all_squares(self, gradients: Any) -> list[mx.array]:
        """Return sums of squares that add up to that of all gradients, the same on all ranks."""
        if (split := self.layers or self.shards) is not None:
            return split.sum_over(gradients, self._squares)
        return [self._squares(gradient) for _, gradient in tree_flatten(gradients)]

    def _squares(self, gradient: mx.array) -> mx.array:
        name = f"sum_of_squares/{str(gradient.dtype).rpartition('.')[2]}"
        if not self._uses_kernel(name):
            return sum_of_squares(gradient)
        from mlxflow.kernels import adamw

        return adamw.kernel_sum_of_squares(gradient)


def _kernel_name(*types: mx.Dtype) -> str:
    return "/".join(["adamw", *(str(dtype).rpartition(".")[2] for dtype in types)])


def _is_elementwise(optimizer: optim.Optimizer) -> bool:
    """Return whether an optimizer's update of a number depends on the gradients of that number only."""
    if isinstance(optimizer, optim.MultiOptimizer):
        return all(_is_elementwise(one) for one in optimizer.optimizers)
    known = (optim.SGD, optim.RMSprop, optim.Adagrad, optim.AdaDelta, optim.Adam, optim.Adamax, optim.Lion)
    return isinstance(optimizer, known)


def _map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Return the first tree with each leaf replaced; empty parts of it may be missing in the others."""
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
    """Return a sum of scalars by fused additions of a few at a time; stacking them would copy each."""
    while len(scalars) > 1:
        scalars = [functools.reduce(operator.add, scalars[begin : begin + 8]) for begin in range(0, len(scalars), 8)]
    return scalars[0]


def _scaled(gradient: mx.array, scale: mx.array, dtype: mx.Dtype) -> mx.array:
    # MLX fuses chains of eleven operations: those of an optimizer and as few of ours as possible
    if gradient.dtype == dtype:
        return gradient * scale.astype(dtype)
    return (gradient.astype(mx.float32) * scale).astype(dtype)


def _keep_where(condition: mx.array, state: Any, before: Any) -> None:
    """Restore, in place, the state before the update where a condition does not hold."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in list(items):
        if isinstance(value, dict | list):
            _keep_where(condition, value, before[key])
        else:
            state[key] = mx.where(condition, value, before[key])


def _assign(state: Any, new: Any) -> None:
    """Replace the arrays of a tree in place by those of another tree of the same form."""
    for key, value in list(state.items() if isinstance(state, dict) else enumerate(state)):
        if isinstance(value, dict | list):
            _assign(value, new[key])
        else:
            state[key] = new[key]
