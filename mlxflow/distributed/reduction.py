"""Sums of arrays over ranks in fp32, in pieces of bounded size, either in rank order or by the backend's own sum."""

from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlxflow.distributed.team import Team

#: Numbers in one piece, 32 MiB in fp32: the memory that a sum needs beside the arrays is one piece for each rank.
PIECE = 1 << 23


def add_in_rank_order(
    team: Team, so_far: Sequence[mx.array], mine: Sequence[mx.array], *, count: int, piece: int = PIECE
) -> list[mx.array]:
    """Return sums to which the arrays of the first ranks were added one after another, in fp32; lazy.

    The result has the same bits on all ranks, and as if one process had added the arrays.

    Args:
        team: of this process.
        so_far: the sums, the same on all ranks.
        mine: arrays of this rank, of the same shapes; any values of that shape on ranks from `count` on.
        count: number of ranks whose arrays are added.
        piece: the most numbers that are sent together.
    """
    sums = _flat(so_far)
    parts: list[mx.array] = []
    for part in _pieces(_flat(mine), piece, after=parts):
        gathered = team.gather(part[None])
        begin = sum(len(done) for done in parts)
        total = sums[begin : begin + len(part)]
        for rank in range(count):
            total = total + gathered[rank]
        parts.append(total)
    return _shaped(parts, so_far)


def sum_fast(team: Team, mine: Sequence[mx.array], *, piece: int = PIECE) -> list[mx.array]:
    """Return the sums of the ranks' arrays in fp32 in an order that the backend chooses; lazy.

    Args:
        team: of this process.
        mine: arrays of this rank.
        piece: the most numbers that are sent together.
    """
    parts: list[mx.array] = []
    for part in _pieces(_flat(mine), piece, after=parts):
        parts.append(team.sum(part))
    return _shaped(parts, mine)


def _flat(arrays: Sequence[mx.array]) -> mx.array:
    return mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays])


def _pieces(array: mx.array, piece: int, *, after: list[mx.array]) -> Iterator[mx.array]:
    """Yield an array in pieces; each is sent after the one before, so that all ranks send in one order.

    Args:
        array: (N,).
        piece: the most numbers in one.
        after: results so far; the next piece depends on the last of them.
    """
    for begin in range(0, len(array), piece):
        part = array[begin : begin + piece]
        yield mx.depends(part, after[-1]) if after else part


def _shaped(parts: Sequence[mx.array], like: Sequence[mx.array]) -> list[mx.array]:
    flat = mx.concatenate(list(parts))
    shaped, begin = [], 0
    for array in like:
        shaped.append(flat[begin : begin + array.size].reshape(array.shape))
        begin += array.size
    return shaped
