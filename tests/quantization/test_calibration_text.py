import itertools

import numpy as np
import pytest

from mlxflow.data.token_file import Rows
from mlxflow.quantization.calibration_text import choose_text


def _rows(lengths: list[int], width: int = 9) -> Rows:
    """Return rows of two pieces of a document and padding; the tokens of a row follow 100 times its number."""
    tokens, marks = np.zeros((len(lengths), width), np.uint16), np.zeros((len(lengths), width), np.uint8)
    for number, length in enumerate(lengths):
        tokens[number, :length] = 100 * (number + 1) + np.arange(length)
        marks[number, :length] = np.where(np.arange(length) < length // 2, 3, 5)
        marks[number, [0, length // 2] if length else []] -= 1  # nothing predicts the first token of a piece
    return Rows(tokens, marks)


def test_full_rows_are_chosen_by_seed_before_others() -> None:
    rows = _rows([9, 7] * 20)
    one, same, other = (choose_text(rows, count=10, skips=0, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.tokens, same.tokens)
    assert not np.array_equal(one.tokens, other.tokens)
    assert len(np.unique(one.tokens)) == 90
    numbers = one.tokens[:, 0] // 100 - 1
    assert np.array_equal(one.tokens, rows.tokens[numbers])
    assert np.array_equal(one.marks, rows.marks[numbers])


def test_rows_that_are_skipped_are_none_of_those_that_are_not() -> None:
    rows = _rows([9] * 40)
    learned, measured = (choose_text(rows, count=10, skips=skips, seed=1).tokens for skips in (0, 10))
    assert not np.isin(measured, learned).any()
    none_left, first = (choose_text(rows, count=30, skips=skips, seed=1).tokens for skips in (40, 0))
    assert np.array_equal(none_left, first)


@pytest.mark.parametrize("skips", [0, 4])
def test_padded_rows_are_joined_to_full_ones_without_padding(skips: int) -> None:
    lengths = np.random.default_rng(0).integers(2, 9, 60).tolist()
    rows = _rows(lengths)
    found = choose_text(rows, count=8, skips=skips, seed=1)
    assert found.tokens.shape == found.marks.shape == (8, 9)
    assert (found.marks != 0).all()
    flat, marks = found.tokens.ravel().tolist(), found.marks.ravel()
    for row in found.marks >> 1:
        assert row[0] == 1
        assert set(np.diff(row).tolist()) <= {0, 1}  # pieces are numbered in each row
    # each token that the one before it predicts in the file is a target, and no other one
    for place, (before, token) in enumerate(itertools.pairwise(flat), start=1):
        number, column = divmod(token, 100)
        is_target = before == token - 1 and column != lengths[number - 1] // 2
        assert bool(marks[place] & 1) == is_target, place
    whole = choose_text(rows, count=100, skips=0, seed=1)
    assert len(whole.tokens) == sum(lengths) // 9
    assert len(np.unique(whole.tokens)) == 9 * len(whole.tokens)


def test_text_that_fills_no_row_is_a_shorter_one() -> None:
    found = choose_text(_rows([3, 2]), count=8, skips=4, seed=1)
    assert sorted(found.tokens[0].tolist()) == [100, 101, 102, 200, 201]
    assert found.marks.shape == (1, 5)


def test_more_than_127_pieces_in_a_row_have_numbers() -> None:
    found = choose_text(_rows([4] * 400, width=1001), count=1, skips=0, seed=1)
    assert found.tokens.shape == (1, 1001)
    assert (found.marks[0] >> 1).max() == 501
