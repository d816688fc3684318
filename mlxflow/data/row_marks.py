"""The marks of packed rows: the document piece of each token, and whether the token is trained on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def has_targets(marks: "NDArray[Any]") -> "NDArray[np.bool_]":
    """Return (R,) whether each row has a token that is trained on.

    Args:
        marks: (R, L + 1); see `token_file.Batch`.
    """
    return np.asarray((marks & 1).any(axis=1))


def marks_of_parts(
    targets: "Sequence[NDArray[np.bool_] | None]",
    numbers: "NDArray[np.int64]",
    lengths: "NDArray[np.int64]",
    room: "NDArray[np.int64]",
) -> "NDArray[Any]":
    """Return the concatenated marks of rows; see `token_file.Batch`.

    Args:
        targets: for each part in row order: whether each token is trained on; None for all.
        numbers: the mark of each part's trained tokens.
        lengths: tokens of each part.
        room: unused positions after each part.
    """
    dtype = np.min_scalar_type(int(numbers.max())).type
    values = np.stack([numbers, np.zeros(len(targets), np.int64)], axis=1).astype(dtype)
    marks = np.repeat(values.ravel(), np.stack([lengths, room], axis=1).ravel())
    starts = np.cumsum(lengths + room) - lengths - room
    marks[starts[numbers > 0]] -= dtype(1)
    for trained, start in zip(targets, starts.tolist(), strict=True):
        if trained is not None:
            marks[start + np.flatnonzero(~trained)] &= ~dtype(1)
    return marks
