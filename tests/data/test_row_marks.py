import numpy as np

from mlxflow.data.row_marks import has_targets, marks_of_parts


def test_marks_have_the_number_of_the_part_and_bit_0_for_targets() -> None:
    targets = [None, np.array([True, False, True])]
    marks = marks_of_parts(targets, np.array([3, 5]), np.array([2, 3]), np.array([0, 1]))
    # a part's first token has nothing before it to be predicted from; the empty place is 0
    assert marks.tolist() == [2, 3, 4, 4, 5, 0]


def test_marks_take_the_smallest_type_that_holds_the_numbers() -> None:
    marks = marks_of_parts([None], np.array([301]), np.array([2]), np.array([1]))
    assert marks.dtype == np.uint16
    assert marks.tolist() == [300, 301, 0]


def test_has_targets_finds_rows_with_a_target() -> None:
    assert has_targets(np.array([[2, 2], [2, 3], [0, 0]], np.uint8)).tolist() == [False, True, False]
