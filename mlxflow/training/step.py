"""The compiled training step in three parts: gradients of some rows, their accumulation, and the optimizer update.

The parts are separate so that an update may take any number of forward passes, and so that a forward pass that runs out
of memory leaves the model unchanged and can be retried with fewer rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxflow.data.loader import DeviceBatch
from mlxflow.ops.module_caches import restored_caches
from mlxflow.ops.overrides import OperationOverrides, replaced_in_evaluation, replaced_operations
from mlxflow.training.batch_size import split
from mlxflow.training.frozen_shards import FrozenShards
from mlxflow.training.gradient_packing import GradientPacking, Gradients, Joined
from mlxflow.training.objective import Objective
from mlxflow.training.optimizer_shards import OptimizerShards
from mlxflow.training.sharded_layers import ShardedLayers
from mlxflow.training.update import Update

_OWN = OperationOverrides()


class Outcome(NamedTuple):
    """The figures of an update: lazy scalars.

    Attributes:
        loss: mean over the target tokens, in nats.
        norm: of the gradient of the mean loss, before clipping.
        learning_rate: of this update.
        is_finite: whether loss and norm are finite; if not, the update changed nothing.
    """

    loss: mx.array
    norm: mx.array
    learning_rate: mx.array
    is_finite: mx.array


class Step:
    """The compiled parts of an update.

    Args:
        model: in training mode; its parameters are evaluated.
        update: of the same model.
        objective: the loss to minimize.
        overrides: which operations of MLX are replaced.

    Attributes:
        state: everything that changes from update to update, including the random state: to evaluate and to save.
        of_update: the optimizer's update, uncompiled.
        gradients: of a batch, uncompiled.
        frozen: the frozen weights that are split between ranks; None if they are whole.
    """

    def __init__(
        self, model: nn.Module, update: Update, objective: Objective, *, overrides: OperationOverrides = _OWN
    ) -> None:
        self.state: list[Any] = [model.state, update.state, mx.random.state]

        def loss(weights: Any, *batch: mx.array) -> tuple[mx.array, mx.array]:
            model.update(weights)
            return objective(model, *batch)

        def compute(tokens: mx.array, *others: mx.array) -> Gradients:
            weights = model.trainable_parameters()
            with restored_caches(model), replaced_operations(model, tokens, overrides):
                (total, count), tree = mx.value_and_grad(loss)(weights, tokens, *others)
            model.update(weights)  # the original weights, not those of the transformation
            return Gradients(total, count, tree)

        def add(total: mx.array, count: mx.array, tree: Any, *batch: mx.array) -> Gradients:
            more = compute(*batch)
            summed = tree_map(lambda one, other: one + other.astype(mx.float32), tree, more.tree)
            return Gradients(total + more.total, count + more.targets, summed)

        read, drawn = [model.state, mx.random.state], [mx.random.state]
        self._compute = cast("Callable[..., Gradients]", mx.compile(compute, inputs=read, outputs=drawn))
        self._add = cast("Callable[..., Gradients]", mx.compile(add, inputs=read, outputs=drawn))
        self._update = mx.compile(
            lambda total, count, arrays: Outcome(*update(total, count, arrays)), inputs=self.state, outputs=self.state
        )
        self._update_of_tree = mx.compile(
            lambda total, count, tree: Outcome(*update(total, count, update.join(tree))),
            inputs=self.state,
            outputs=self.state,
        )
        self._model, self._overrides = model, overrides
        self.frozen: FrozenShards | None = None
        self.of_update = update
        self.gradients = compute
        self._read, self._drawn = read, drawn

    def whole_state(self) -> Any:
        """Return the state of the update for a checkpoint; of several ranks that share it only rank 0 gets it."""
        return self.of_update.whole_state()

    def state_like(self) -> Any:
        """Return a tree of the shapes and dtypes of `whole_state`, whose arrays may be replaced."""
        return self.of_update.state_like()

    def restore(self, state: Any) -> None:
        """Take a state of the update from a checkpoint, and set the model's weights from it."""
        self.of_update.restore(state)

    def shared_weights(self) -> Any:
        """Return a tree of weights that every rank has: those of the state, or else the model's."""
        return self.of_update.shared_weights()

    def compute(self, *batch: mx.array) -> Gradients:
        """Return the gradients of a batch in the dtypes of the weights.

        Args:
            batch: tokens and marks, (B, L + 1) each, and the further arrays that the objective takes.
        """
        return Gradients(*self._compute(*batch))

    def add(self, so_far: Gradients | None, *batch: mx.array) -> Gradients:
        """Return the gradients of a batch, see `compute`, added to earlier ones, in fp32."""
        return Gradients(*self._add(*(self.zeros() if so_far is None else so_far), *batch))

    def zeros(self) -> Gradients:
        """Return the sums of no rows, in fp32."""
        zeros = tree_map(lambda weight: mx.zeros(weight.shape, mx.float32), self._model.trainable_parameters())
        return Gradients(mx.array(0.0), mx.array(0.0), zeros)

    @property
    def shards(self) -> OptimizerShards | None:
        """The parts of the state that this rank keeps; None if it keeps all of it."""
        return self.of_update.shards

    @property
    def layers(self) -> ShardedLayers | None:
        """The layers that are split between ranks; None if they are whole."""
        return self.of_update.layers

    @property
    def gathers(self) -> bool:
        """Whether a forward pass gathers weights, so that all ranks must make theirs together."""
        return self.layers is not None or self.frozen is not None

    def gradients_like(self) -> Any:
        """Return a tree of the shapes of the whole model's gradients, whose arrays may be replaced."""
        layers = self.of_update.layers
        if layers is not None:
            return layers.tree_like()
        return tree_map(lambda weight: weight, self._model.trainable_parameters())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluate the model in a block, with the products of a step; a collective where the layers are split."""
        layers, frozen = self.of_update.layers, self.frozen
        self.end()
        with replaced_in_evaluation(self._overrides):
            yield
        if frozen is not None:
            frozen.split_again()
        if layers is not None:
            layers.is_whole = False
            self.of_update.publish()

    def end(self) -> None:
        """Leave the model with whole weights after the last update."""
        if self.of_update.layers is not None:
            self.of_update.layers.make_whole()
        if self.frozen is not None:
            self.frozen.make_whole()

    def packing(self) -> GradientPacking:
        """Return how the gradients are sent to other ranks."""
        return GradientPacking(self._model.trainable_parameters(), self.of_update.layout)

    def compiled(self, of_gradients: Callable[..., Any]) -> Callable[..., Any]:
        """Return a compiled function of a batch's arrays and of earlier sums that computes the gradients of the batch.

        Args:
            of_gradients: of the gradients and the sums.
        """

        def compute(batch: tuple[mx.array, ...], *sums: Any) -> Any:
            return of_gradients(self.gradients(*batch), *sums)

        return mx.compile(compute, inputs=self._read, outputs=self._drawn)

    def update(self, gradients: Gradients | Joined) -> Outcome:
        """Update the model from the gradients of all its batches."""
        compiled = self._update if isinstance(gradients, Joined) else self._update_of_tree
        return Outcome(*compiled(*gradients))


def accumulate(
    step: Step,
    batch: DeviceBatch,
    *,
    batch_size: int,
    width: int | None = None,
    after_each: Callable[[Gradients], object] = lambda gradients: None,
) -> Gradients:
    """Return the gradients of all rows of an update, (R, L + 1), summed over smaller forward passes.

    Args:
        step: of the model.
        batch: the rows.
        batch_size: rows of a forward pass.
        width: positions of a row that are computed; None for those that a forward pass needs.
        after_each: called with the sums after each of several forward passes.
    """
    rows = len(batch.tokens)
    if rows <= batch_size:
        return step.compute(*batch.part(0, rows, width=width))
    so_far = None
    for begin, end in split(rows, batch_size):
        so_far = step.add(so_far, *batch.part(begin, end, width=width))
        after_each(so_far)
    return cast("Gradients", so_far)
