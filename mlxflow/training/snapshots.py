"""The state of a training run as the arrays and numbers of a checkpoint, and back."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxflow.training.batch_size import BatchSizes
from mlxflow.training.checkpoints import Checkpoint
from mlxflow.training.restoring import unlike_arrays, unlike_facts, unlike_sizes
from mlxflow.training.run_state import RunState
from mlxflow.training.step import Gradients, Step, put_random_key


class Snapshots:
    """Takes and restores the state of a training run.

    Args:
        model: in training.
        step: of the model.
        sizes: of the batches.
        state: of the run.
    """

    def __init__(self, model: nn.Module, step: Step, sizes: BatchSizes, state: RunState) -> None:
        self._model = model
        self._step = step
        self._sizes = sizes
        self._state = state

    def arrays(self, partial: Gradients | None) -> dict[str, Any]:
        """Return all arrays that a checkpoint keeps, as a tree.

        Args:
            partial: sums of an update that was cut short.
        """
        found: dict[str, Any] = {"update": self._step.state[1], "random": list(self._step.state[2])}
        if partial is not None:
            found["partial"] = list(partial)
        return found

    def unfit(self, checkpoint: Checkpoint) -> str:
        """Return why this run cannot go on from a checkpoint; empty where it can."""
        facts = dict(checkpoint.facts)
        sizes = facts.pop("sizes", None)
        problem = unlike_facts(facts, vars(self._state)) or unlike_sizes(sizes)
        return problem or unlike_arrays(checkpoint.arrays, self._target(facts["rows_done"]))

    def _target(self, rows_done: int) -> dict[str, Any]:
        """Return what the arrays of a checkpoint are put into, with the sums of an update that was cut short."""
        target = self.arrays(None)
        if rows_done:
            zero = mx.array(0.0)
            target["partial"] = [zero, zero, tree_map(lambda weight: weight, self._model.trainable_parameters())]
        return target

    def restore(self, checkpoint: Checkpoint) -> Gradients | None:
        """Put a checkpoint into model, optimizer, random numbers, batch sizes and counts.

        Returns:
            sums of the update that was cut short; None where none was.
        """
        kept = dict(checkpoint.facts)
        self._sizes.restore(kept.pop("sizes"))
        vars(self._state).update(kept)
        target = self._target(self._state.rows_done)
        _assign(target, "", checkpoint.arrays)
        self._step.publish()
        put_random_key(target["random"][0])
        mx.eval(self._step.state)
        checkpoint.arrays.clear()  # whoever holds the checkpoint must not hold the old weights
        return Gradients(*target["partial"]) if self._state.rows_done else None


def _assign(tree: Any, path: str, arrays: Mapping[str, mx.array]) -> None:
    """Replace every leaf, in place, by the array of its path."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict | list):
            _assign(value, name, arrays)
        else:
            tree[key] = arrays[name]
