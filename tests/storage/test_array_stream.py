from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlxflow.storage.array_stream import ArrayStream


def test_a_stream_holds_the_entries_of_every_append(tmp_path: Path) -> None:
    with ArrayStream(tmp_path / "a.safetensors", {"tokens": ("uint16", (3,)), "lengths": ("int64", ())}) as stream:
        stream.append("tokens", np.array([[1, 2, 3]]))
        stream.append("lengths", np.array([7]))
        stream.append("tokens", np.array([[4, 5, 60_000]]))
    arrays = load_file(tmp_path / "a.safetensors")
    assert arrays["tokens"].tolist() == [[1, 2, 3], [4, 5, 60_000]]
    assert arrays["tokens"].dtype == np.uint16
    assert arrays["lengths"].tolist() == [7]


@pytest.mark.parametrize(("largest", "dtype"), [(255, "uint8"), (256, "uint16"), (2**16, "uint32"), (2**32, "uint64")])
def test_a_column_without_a_type_takes_the_smallest_that_holds_its_values(
    tmp_path: Path, largest: int, dtype: str
) -> None:
    with ArrayStream(tmp_path / "a.safetensors", {"first": ("uint8", ()), "grows": (None, ())}) as stream:
        stream.append("grows", np.array([3, 200], np.uint64))
        stream.append("grows", np.array([largest, 1], np.uint64))
    found = load_file(tmp_path / "a.safetensors")["grows"]
    assert found.dtype == dtype
    assert found.tolist() == [3, 200, largest, 1]


def test_entries_of_another_shape_are_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"a: expected entries of shape \(2,\), got \(3,\)"),
        ArrayStream(tmp_path / "a.safetensors", {"a": ("uint8", (2,))}) as stream,
    ):
        stream.append("a", np.zeros((1, 3), np.uint8))


def test_metadata_larger_than_the_room_for_the_header_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="200 were kept for it"),
        ArrayStream(tmp_path / "a.safetensors", {"a": ("uint8", ())}, header_bytes=200) as stream,
    ):
        stream.metadata["note"] = "x" * 200
