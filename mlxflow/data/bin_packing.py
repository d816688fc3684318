"""Bin packing: place documents in rows of a fixed length.

Best fit: each piece goes into the open row with the smallest sufficient room, longest pieces first (best-fit
decreasing; Johnson et al., SIAM J. Comput. 3, 1974). Open rows are indexed by their room; a bit set of the existing
rooms gives the smallest sufficient one by a shift.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Packing = Literal["best-fit", "concat", "none"]


class Piece(NamedTuple):
    """A part of a document in one row.

    Attributes:
        document: its number.
        begin: its first token within the document.
        end: one past its last token.
    """

    document: int
    begin: int
    end: int


def cut(document: int, length: int, capacity: int) -> list[Piece]:
    """Return a document as pieces that fit a row: full rows first, then the remainder."""
    return [Piece(document, begin, min(begin + capacity, length)) for begin in range(0, length, capacity)]


def cut_continuously(document: int, length: int, capacity: int, filled: int) -> list[Piece]:
    """Return a document as pieces that continue a row: the first piece fills its remaining room.

    Args:
        document: its number.
        length: its tokens.
        capacity: tokens that a row holds.
        filled: tokens that the row holds already.
    """
    first = min(length, capacity - filled)
    head = [Piece(document, 0, first)] if first else []
    return head + [Piece(document, begin, min(begin + capacity, length)) for begin in range(first, length, capacity)]


def best_fit(lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """Assign pieces to rows.

    Args:
        lengths: of the pieces, each from 1 to `capacity`.
        capacity: tokens that a row holds.

    Returns:
        the row of each piece, and the number of rows.
    """
    rows = [0] * len(lengths)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room
    rooms = 0  # bit r: there is an open row with room r
    count = 0
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = lengths[index]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            stack = open_rows[room]
            row = stack.pop()
            if not stack:
                rooms ^= 1 << room
        else:
            room, row = capacity, count
            count += 1
        rows[index] = row
        left = room - length
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    return rows, count


def continuous(lengths: Sequence[int], capacity: int, filled: int) -> list[int]:
    """Return the row of each piece of a continuous stream; the first row holds `filled` tokens already."""
    rows: list[int] = []
    at = filled
    for length in lengths:
        rows.append(at // capacity)
        at += length
    return rows
