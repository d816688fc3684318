import numpy as np

from mlxflow.profiling.downsampled_table import Columns


def test_a_full_table_halves_its_rows_and_keeps_the_maximum() -> None:
    columns = Columns(("step", "peak"), capacity=8, most=("peak",))
    for step in range(100):
        columns.append((step, 1000 if step == 41 else step))
    assert 4 <= len(columns) <= 8
    assert columns.column("peak").max() == 1000
    assert np.all(np.diff(columns.column("step")) == np.diff(columns.column("step"))[0])


def test_columns_are_integers_except_the_fractions() -> None:
    columns = Columns(("step", "seconds"), capacity=4, most=())
    columns.append((3, 0.25))
    arrays = columns.arrays(fractions=("seconds",))
    assert arrays["step"].tolist() == [3]
    assert arrays["step"].dtype == np.int64
    assert arrays["seconds"].tolist() == [0.25]
    assert arrays["seconds"].dtype == np.float32


def test_a_returned_column_does_not_change_with_the_table() -> None:
    columns = Columns(("step",), capacity=4, most=())
    columns.append((1,))
    before = columns.column("step")
    for step in range(2, 9):
        columns.append((step,))
    assert before.tolist() == [1]
