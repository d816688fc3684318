"""A training step done for nothing but what it makes MLX compile, while it is not known yet which kernels serve."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlxflow.data.token_file import Rows
from mlxflow.errors import reason_of
from mlxflow.evaluation.perplexity import measure_perplexity
from mlxflow.system import terminal
from mlxflow.training.step import Step, put_random_key


def rehearse(
    model: nn.Module,
    make_step: Callable[[], Step],
    rows: Rows,
    *,
    is_one_pass: bool,
    masks_documents: bool,
) -> None:
    """Do a step and a validation as training will, with kernels that do nothing; the model is left as it was.

    MLX compiles the operations of a step on CUDA when it comes to them, 3 to 5 s each, and keeps them in a folder of
    its own. A rehearsal that fails says so, and has compiled what came before.

    Args:
        model: in training mode, evaluated.
        make_step: returns the step; what it launches of our kernels is a program that does nothing.
        rows: of a forward pass, from the training tokens.
        is_one_pass: whether an update takes one forward pass.
        masks_documents: no token attends to another document in its row.
    """
    from mlxflow.kernels import codegen

    try:
        with _restored(model), codegen.doing_nothing():
            _do(make_step(), rows, is_one_pass=is_one_pass)
            measure_perplexity(model, rows, batch_size=rows.num_rows, masks_documents=masks_documents)
    except Exception as failure:  # whatever it is, training goes on or comes to it, too
        said = reason_of(failure)
        terminal.say(f"mlxflow: not all of the first step was compiled ahead ({said})")
    mx.clear_cache()


def _do(step: Step, rows: Rows, *, is_one_pass: bool) -> None:
    tokens, marks = mx.array(rows.tokens), mx.array(rows.marks)
    gradients = step.compute(tokens, marks) if is_one_pass else step.add(tokens, marks, None)
    mx.eval(step.update(gradients), step.state)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put the model's weights and the random numbers back when the block ends."""
    weights = tree_map(lambda leaf: leaf, model.parameters())
    (key,) = cast("Any", mx.random.state)
    try:
        yield
    finally:
        model.update(weights)
        model.train()
        put_random_key(key)
