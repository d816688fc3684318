import numpy as np
import pytest

from mlxflow.data.row_widths import lengths_of, mean_width, width_of


def test_the_length_of_a_row_ends_with_its_last_target() -> None:
    marks = np.array([[3, 3, 2, 2, 0], [2, 2, 2, 3, 0], [3, 3, 3, 3, 3], [3, 2, 2, 0, 0], [0, 0, 0, 0, 0]], np.uint8)
    assert lengths_of(marks).tolist() == [1, 3, 4, 0, 0]  # the first token of a row is predicted by nothing


@pytest.mark.parametrize(
    ("longest", "context_length", "width"),
    [
        (1, 256, 32),
        (32, 256, 32),
        (33, 256, 64),
        (256, 256, 256),
        (0, 256, 32),  # a pass without a target has rows
        (90, 100, 96),
        (97, 100, 100),
        (5, 20, 20),
        (1, 2048, 256),
        (257, 2048, 512),
        (2100, 2304, 2304),
    ],
)
def test_a_width_is_the_longest_row_rounded_up(longest: int, context_length: int, width: int) -> None:
    assert width_of(np.array([0, longest]), context_length) == width


@pytest.mark.parametrize("context_length", [1, 31, 32, 255, 256, 257, 2048, 8191, 131_072])
def test_there_are_few_widths_and_each_holds_its_rows(context_length: int) -> None:
    lengths = np.unique(np.linspace(0, context_length, 1000).astype(np.int64))
    widths = [width_of(lengths[: number + 1], context_length) for number in range(len(lengths))]
    assert len(set(widths)) <= 8
    assert all(length <= width <= context_length for length, width in zip(lengths, widths, strict=True))


def test_no_rows_have_the_width_of_the_context() -> None:
    assert width_of(np.zeros(0, np.int64), 100) == 100


def test_the_mean_width_is_that_of_passes_in_a_random_order() -> None:
    marks = np.zeros((64, 97), np.uint8)
    marks[:, :20] = 3
    marks[::2, :] = 3  # every second row is full: in order, no two short rows would meet
    found = mean_width(marks, 2)
    assert 32 + 64 / 2 < found < 96
    assert mean_width(marks[1::2], 2) == 32
    assert mean_width(marks[1::2], 100) == 32  # more than there are
