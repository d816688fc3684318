import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from mlxflow.messages.errors import StageError
from mlxflow.storage import tensor_reading, tensor_writing


def test_equal_tensors_are_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    tensors = {"b": mx.arange(6).reshape(2, 3), "a": mx.ones((4,), mx.bfloat16)}
    tensor_writing.write_tensors(tmp_path / "1.safetensors", tensors, {"x": "1", "a": "2"})
    tensor_writing.write_tensors(tmp_path / "2.safetensors", dict(reversed(tensors.items())), {"a": "2", "x": "1"})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    arrays: dict[str, NDArray[Any]] = {"b": np.arange(6), "a": np.ones(4, np.float32)}
    tensor_writing.write_arrays(tmp_path / "3.safetensors", arrays, {"x": "1", "a": "2"})
    tensor_writing.write_arrays(tmp_path / "4.safetensors", dict(reversed(arrays.items())), {"a": "2", "x": "1"})
    assert (tmp_path / "3.safetensors").read_bytes() == (tmp_path / "4.safetensors").read_bytes()


def test_a_file_larger_than_the_free_space_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    path = tmp_path / "train" / "a.safetensors"
    path.parent.mkdir()
    with pytest.raises(StageError) as caught:
        tensor_writing.write_tensors(path, {"a": mx.zeros((50,))}, {})
    assert str(caught.value) == f"a.safetensors: needs 200 bytes, 100 bytes are free in {tmp_path}. Make room."
    assert not path.exists()


def test_check_whole_refuses_a_file_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor_writing.write_tensors(path, {"a": mx.zeros((50,))}, {})
    tensor_writing.check_whole(path)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(StageError) as caught:
        tensor_writing.check_whole(path)
    said = f"it has {size - 1:,} bytes, its header says {size:,}; "
    assert str(caught.value).startswith(f"a.safetensors: was not written to its end ({said}")


def test_a_written_file_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        tensor_writing.write_arrays(tmp_path / "a.safetensors", {"a": np.ones(1, np.float32)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_are_written_and_read_one_part_after_the_other(tmp_path: Path, dtype: mx.Dtype) -> None:
    whole = mx.random.normal((2, 5, 3)).astype(dtype)
    flat = whole.reshape(-1, 3)
    with tensor_writing.TensorFile(tmp_path / "a.safetensors", {"x": (dtype, (2, 5, 3))}, {}) as file:
        file.put_rows("x", flat[:4])
        file.put_rows("x", flat[4:])
        with pytest.raises(ValueError, match="after 10 rows"):
            file.put_rows("x", flat[:1])
    found = mx.load(str(tmp_path / "a.safetensors"))
    assert isinstance(found, dict)
    assert mx.array_equal(found["x"], whole)
    rows = tensor_reading.stored_rows(tmp_path / "a.safetensors")["x"]
    assert mx.array_equal(rows.read(3, 9), flat[3:9])
    assert rows.read(3, 9).dtype == dtype


def test_a_tensor_file_without_all_rows_of_a_tensor_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="without x"),
        tensor_writing.TensorFile(tmp_path / "a.safetensors", {"x": (mx.float32, (4, 3))}, {}) as file,
    ):
        file.put_rows("x", mx.zeros((3, 3)))
