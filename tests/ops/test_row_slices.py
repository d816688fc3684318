"""Large matrices in slices of rows: the same numbers, in less memory."""

from typing import Any

import mlx.core as mx
import pytest

from mlxflow.ops import row_slices

FORMS = [(2, 64, "affine"), (3, 32, "affine"), (4, 64, "affine"), (6, 128, "affine"), (4, 32, "mxfp4")]


@pytest.mark.parametrize(("bits", "group_size", "mode"), FORMS)
def test_slices_are_dequantized_to_the_same_numbers(
    bits: int, group_size: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = mx.random.normal((3, 50, 256), key=mx.random.key(0))
    named: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    codes, scales, *biases = mx.quantize(weight, **named)
    exact = mx.dequantize(codes, scales, biases[0] if biases else None, **named, dtype=mx.float32)
    monkeypatch.setattr(row_slices, "_LARGE", 1000)
    monkeypatch.setattr(row_slices, "_SLICE", 256 * 7)
    found = row_slices.dequantized(codes, scales, biases[0] if biases else None, **named, dtype=mx.float32)
    assert found.shape == weight.shape
    assert mx.array_equal(found, exact)


def test_a_function_of_rows_is_computed_in_slices_only_where_a_matrix_is_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def doubled(rows: mx.array) -> mx.array:
        seen.append(len(rows))
        return 2 * rows

    matrix = mx.arange(40.0).reshape(10, 4)
    assert mx.array_equal(row_slices.by_rows(doubled, matrix, width=4), 2 * matrix)
    monkeypatch.setattr(row_slices, "_LARGE", 39)
    monkeypatch.setattr(row_slices, "_SLICE", 16)
    assert mx.array_equal(row_slices.by_rows(doubled, matrix, width=4), 2 * matrix)
    assert seen == [10, 4, 4, 2]
    assert [one.tolist() for one in row_slices.slices_of(matrix[:3], 8)] == [
        matrix[:2].tolist(),
        matrix[2:3].tolist(),
    ]
