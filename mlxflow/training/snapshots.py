"""Save and restore the state of a training run as the arrays and numbers of a checkpoint."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxflow.ops.random_state import put_random_key
from mlxflow.training.batch_size import BatchSizes
from mlxflow.training.checkpoints import Checkpoint
from mlxflow.training.gradient_packing import Gradients
from mlxflow.training.restoring import arrays_problem, facts_problem, sizes_problem
from mlxflow.training.run_state import RunState
from mlxflow.training.step import Step


class Snapshots:
    """Saves and restores the state of a training run.

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
        """Return all arrays of a checkpoint, as a tree.

        Args:
            partial: sums of an interrupted update.
        """
        tree = self._tree(self._step.whole_state())
        if partial is not None:
            tree["partial"] = list(partial)
        return tree

    def _tree(self, update: Any) -> dict[str, Any]:
        return {"update": update, "random": list(self._step.state[2])}

    def unfit(self, checkpoint: Checkpoint) -> str:
        """Return why this run cannot continue from a checkpoint; empty if it can."""
        facts = dict(checkpoint.facts)
        sizes = facts.pop("sizes", None)
        problem = facts_problem(facts, vars(self._state)) or sizes_problem(sizes)
        return problem or arrays_problem(checkpoint.arrays, self._target(facts["rows_done"]))

    def _target(self, rows_done: int) -> dict[str, Any]:
        """Return the tree that the arrays of a checkpoint are assigned to, with the sums of an interrupted update."""
        target = self._tree(self._step.state_like())
        if rows_done:
            zero = mx.array(0.0)
            target["partial"] = [zero, zero, self._step.gradients_like()]
        return target

    def restore(self, checkpoint: Checkpoint) -> Gradients | None:
        """Restore model, optimizer, random state, batch sizes and counts from a checkpoint.

        Returns:
            sums of an interrupted update; None if there was none.
        """
        facts = dict(checkpoint.facts)
        self._sizes.restore(facts.pop("sizes"))
        vars(self._state).update(facts)
        target = self._target(self._state.rows_done)
        _assign(target, "", checkpoint.arrays)
        self._step.restore(target["update"])
        put_random_key(target["random"][0])
        mx.eval(self._step.state)
        checkpoint.arrays.clear()  # references to the checkpoint must not keep the old weights alive
        return Gradients(*target["partial"]) if self._state.rows_done else None


def _assign(tree: Any, path: str, arrays: Mapping[str, mx.array]) -> None:
    """Replace every leaf, in place, by the array with its path as name."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict | list):
            _assign(value, name, arrays)
        else:
            tree[key] = arrays[name]
