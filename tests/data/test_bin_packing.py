import random
from itertools import groupby

import numpy as np
import pytest

from mlxflow.data.bin_packing import Piece, best_fit, continuous, cut, cut_continuously


def _fewest_rows(lengths: list[int], capacity: int) -> int:
    """Return the fewest rows that hold the pieces, by trying everything."""
    best = len(lengths)

    def place(index: int, rooms: tuple[int, ...]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for i, room in enumerate(rooms):
            if room >= lengths[index]:
                place(index + 1, (*rooms[:i], room - lengths[index], *rooms[i + 1 :]))
        place(index + 1, (*rooms, capacity - lengths[index]))

    place(0, ())
    return best


def _by_hand(lengths: list[int], capacity: int) -> list[int]:
    """Return best-fit decreasing by its definition: the fullest row that has room, looked for one by one."""
    rooms: list[int] = []
    rows = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            rooms.append(capacity)
            fitting = [(capacity, len(rooms) - 1)]
        row = min(fitting)[1]
        rooms[row] -= lengths[index]
        rows[index] = row
    return [sum(lengths[i] for i in range(len(lengths)) if rows[i] == row) for row in range(len(rooms))]


@pytest.mark.parametrize("seed", range(30))
def test_best_fit_matches_its_definition_and_is_near_the_minimum_number_of_rows(seed: int) -> None:
    generator = random.Random(seed)
    capacity = generator.choice([4, 7, 12])
    lengths = [generator.randint(1, capacity) for _ in range(9)]
    rows, count = best_fit(lengths, capacity)
    fills = [sum(n for n, row in zip(lengths, rows, strict=True) if row == one) for one in range(count)]
    assert max(fills) <= capacity
    assert min(fills) > 0
    assert sorted(fills) == sorted(_by_hand(lengths, capacity))
    fewest = _fewest_rows(lengths, capacity)
    assert fewest <= count <= -(-11 * fewest // 9) + 1  # Johnson's bound for decreasing fits


@pytest.mark.parametrize("capacity", [513, 2049])
def test_documents_of_natural_lengths_fill_rows_almost_completely(capacity: int) -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 40_000).astype(int) + 1
    pieces = [piece.end - piece.begin for i, n in enumerate(lengths) for piece in cut(i, int(n), capacity)]
    rows, count = best_fit(pieces, capacity)
    assert sum(pieces) / (count * capacity) > 0.9995
    assert np.bincount(rows, weights=pieces).max() <= capacity


def test_no_documents_need_no_rows() -> None:
    assert best_fit([], 5) == ([], 0)


@pytest.mark.parametrize("length", [1, 4, 5, 6, 10, 11, 23])
def test_a_long_document_is_split_into_full_rows_and_a_remainder(length: int) -> None:
    pieces = cut(7, length, 5)
    assert [piece.document for piece in pieces] == [7] * len(pieces)
    assert [i for piece in pieces for i in range(piece.begin, piece.end)] == list(range(length))
    assert all(piece.end - piece.begin == 5 for piece in pieces[:-1])
    assert len(pieces) == -(-length // 5)


@pytest.mark.parametrize("filled", range(5))
@pytest.mark.parametrize("length", [1, 4, 5, 6, 23])
def test_a_continuous_document_fills_what_is_left_of_a_row_first(length: int, filled: int) -> None:
    pieces = cut_continuously(7, length, 5, filled)
    assert [i for piece in pieces for i in range(piece.begin, piece.end)] == list(range(length))
    rows = continuous([piece.end - piece.begin for piece in pieces], 5, filled)
    assert [len(list(group)) for _, group in groupby(rows)] == [1] * len(rows)  # no two pieces in one row
    assert pieces[0] == Piece(7, 0, min(length, 5 - filled))
