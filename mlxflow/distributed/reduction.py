"""Sums of arrays over ranks in fp32, either in rank order or by the backend's own sum.

Each piece is sent by an evaluation of its own. On CUDA the host waits for the device where one evaluation has work on
two streams (MLX's fence between them), and does not where a later evaluation uses a result of an earlier one. So the
device sends while it computes what is left of the backward pass, and the host runs ahead. All ranks send in one order,
that of the calls.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlxflow.distributed.team import Team

#: Numbers that all ranks together send at a time.
PIECE = 1 << 28


def gather_pieces(team: Team, array: mx.array, *, piece: int = PIECE) -> list[mx.array]:
    """Send an array to all ranks; return its pieces of all ranks, (number of ranks, N) each.

    Args:
        team: of this process.
        array: of one dimension, scheduled for evaluation before.
        piece: the most numbers that all ranks send together.
    """
    return [_sent(team.gather(part)) for part in split(array, team, piece=piece)]


def sum_pieces(team: Team, array: mx.array, *, piece: int = PIECE) -> list[mx.array]:
    """Let the backend add the arrays of all ranks in fp32; return the pieces of the sum, (1, N) each.

    A piece is converted to fp32 when it is sent, and its sum takes its place in memory. The array itself is freed as
    soon as it is sent, if the caller holds it no longer.

    Args:
        team: of this process.
        array: of one dimension, scheduled for evaluation before.
        piece: the most numbers that all ranks send together.
    """
    parts = split(array, team, piece=piece)
    del array
    return [_sent(team.sum(_exact(parts.pop(0), team))) for _ in range(len(parts))]


def sum_part_in_pieces(team: Team, rows: mx.array, *, piece: int = PIECE) -> list[mx.array]:
    """Let the backend add the rows of all ranks in fp32; return the pieces of this rank's row of the sum, (1, N) each.

    Args:
        team: of this process.
        rows: one for each rank, (number of ranks, N), scheduled for evaluation before.
        piece: the most numbers that a rank sends at a time.
    """
    numbers = max(1, piece // team.size)
    with team.communicating():
        parts = [rows[:, begin : begin + numbers] for begin in range(0, rows.shape[1], numbers)]
    del rows
    return [_sent(team.sum_part(_exact(parts.pop(0), team))) for _ in range(len(parts))]


def _exact(part: mx.array, team: Team) -> mx.array:
    """Return a part in fp32, an array of its own that a collective may overwrite; on the stream of the collectives."""
    with team.communicating():
        return part.astype(mx.float32)


def added_in_rank_order(
    pieces: Sequence[mx.array], so_far: Sequence[mx.array] | None = None, *, count: int
) -> list[mx.array]:
    """Return the pieces of the sum of an array over the first ranks, added one after another in fp32; lazy.

    The result has the same bits on all ranks, and as if one process had added the arrays.

    Args:
        pieces: of the array, (number of ranks, N) each, as `gather_pieces` returns them.
        so_far: an earlier sum in the same pieces, (N,) each, the same on all ranks; None for zeros.
        count: number of ranks whose arrays are added.
    """
    sums: Sequence[Any] = [0.0] * len(pieces) if so_far is None else so_far
    for rank in range(count):
        # a slice is a view, where an integer would copy the row
        rows = [piece[rank : rank + 1].reshape(-1).astype(mx.float32) for piece in pieces]
        sums = [total + row for total, row in zip(sums, rows, strict=True)]
    return list(sums)


def _sent(array: mx.array) -> mx.array:
    mx.async_eval(array)
    return array


def split(array: mx.array, team: Team, *, piece: int = PIECE) -> list[mx.array]:
    """Return an array of one dimension in the pieces that are sent, (1, N) each; on the stream of the collectives.

    Args:
        array: to split.
        team: of this process.
        piece: the most numbers that all ranks send together.
    """
    numbers = max(1, piece // team.size)
    with team.communicating():
        return [array[None, begin : begin + numbers] for begin in range(0, array.size, numbers)]
