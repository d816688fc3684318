"""Precompile a training step with empty kernels: MLX compiles its operations while our kernels are verified."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxflow.data.token_file import Rows
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.messages import terminal
from mlxflow.messages.errors import reason_of
from mlxflow.ops.random_state import same_random_state
from mlxflow.training.step import Step


def precompile_step(
    model: nn.Module,
    make_step: Callable[[], Step],
    rows: Rows,
    *,
    is_one_pass: bool,
    masks_documents: bool,
) -> None:
    """Run a step and a validation with empty kernels in place of ours; model and random state are restored.

    On CUDA MLX compiles the operations of a step at their first use, 3 to 5 s each, and caches them on the disk. A
    step that fails is logged; what it compiled before stays cached.

    Args:
        model: in training mode, evaluated.
        make_step: returns the step, in which each of our kernels is an empty program.
        rows: of one forward pass, from the training tokens.
        is_one_pass: whether an update takes one forward pass.
        masks_documents: no token attends to another document in its row.
    """
    from mlxflow.kernels import codegen

    try:
        with restored(model), codegen.doing_nothing():
            step = make_step()
            _do(step, rows, is_one_pass=is_one_pass)
            with step.evaluating():
                measure_perplexity(model, rows, batch_size=rows.num_rows, masks_documents=masks_documents)
    except Exception as failure:  # whatever it is, training is not affected or fails with it, too
        reason = reason_of(failure)
        terminal.say(f"mlxflow: not all of the first step was compiled ahead ({reason})")
    mx.clear_cache()


def _do(step: Step, rows: Rows, *, is_one_pass: bool) -> None:
    batch = [mx.array(part) for part in (rows.tokens, rows.marks, *rows.extras)]
    gradients = step.compute(*batch) if is_one_pass else step.add(None, *batch)
    mx.eval(step.update(gradients), step.state)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore the model's weights and MLX's random state when the block ends."""
    weights = tree_map(lambda leaf: leaf, model.parameters())
    with same_random_state():
        try:
            yield
        finally:
            model.update(weights)
            model.train()
