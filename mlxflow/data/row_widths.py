"""How many positions of padded rows are computed: as many as the longest row of a forward pass has, rounded up.

Rows of conversations that are not packed end in padding, which costs as much as text. MLX compiles a step for each
width, so there are few of them.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from mlxflow.data.shuffle import Permutation

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Widths are multiples of this, so that matrix units have whole tiles, and of a part of the context
_LEAST_STEP, _MOST_WIDTHS = 32, 8

# Rows from which a mean is estimated
_SAMPLED_ROWS = 1024


def lengths_of(marks: "NDArray[Any]") -> "NDArray[np.int64]":
    """Return (B,) of each row the positions, of L, up to the one that predicts its last target; 0 without a target.

    What follows is not needed for the losses: no token attends to a later one.

    Args:
        marks: (B, L + 1); see `token_file.Batch`.
    """
    are_targets = marks[:, :0:-1] & 1
    return np.where(are_targets.any(axis=1), are_targets.shape[1] - are_targets.argmax(axis=1), 0)


def width_of(lengths: "NDArray[np.int64]", context_length: int) -> int:
    """Return the positions that a forward pass computes.

    Args:
        lengths: (B,) of each row the positions that are needed.
        context_length: positions of a row, L; the width of no rows.
    """
    if not len(lengths):
        return context_length
    step = -(-context_length // (_LEAST_STEP * _MOST_WIDTHS)) * _LEAST_STEP
    return min(context_length, -(-max(1, int(lengths.max())) // step) * step)


def mean_width(marks: "NDArray[Any]", batch_size: int) -> float:
    """Return the mean width of forward passes over rows in a random order, from a sample of them.

    Args:
        marks: (R, L + 1); see `token_file.Batch`.
        batch_size: rows of a forward pass.
    """
    count, length = len(marks), marks.shape[1] - 1
    batch_size = min(batch_size, count)
    sampled = min(count, max(batch_size, _SAMPLED_ROWS)) // batch_size * batch_size
    lengths = lengths_of(marks[Permutation(count, seed=0, epoch=0)(np.arange(sampled))])
    return float(
        np.mean([width_of(lengths[begin : begin + batch_size], length) for begin in range(0, sampled, batch_size)])
    )
