import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mlxflow.errors import ArtifactError, StageError
from mlxflow.storage import artifact_files


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_equal_tensors_are_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    tensors = {"b": mx.arange(6).reshape(2, 3), "a": mx.ones((4,), mx.bfloat16)}
    artifact_files.write_tensors(tmp_path / "1.safetensors", tensors, {"x": "1", "a": "2"})
    artifact_files.write_tensors(tmp_path / "2.safetensors", dict(reversed(tensors.items())), {"a": "2", "x": "1"})
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    arrays: dict[str, NDArray[Any]] = {"b": np.arange(6), "a": np.ones(4, np.float32)}
    artifact_files.write_arrays(tmp_path / "3.safetensors", arrays, {"x": "1", "a": "2"})
    artifact_files.write_arrays(tmp_path / "4.safetensors", dict(reversed(arrays.items())), {"a": "2", "x": "1"})
    assert (tmp_path / "3.safetensors").read_bytes() == (tmp_path / "4.safetensors").read_bytes()


def test_a_file_that_will_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    path = tmp_path / "train" / "a.safetensors"
    path.parent.mkdir()
    with pytest.raises(StageError) as caught:
        artifact_files.write_tensors(path, {"a": mx.zeros((50,))}, {})
    assert str(caught.value) == f"a.safetensors: needs 200 bytes, 100 are free in {tmp_path}. Make room."
    assert not path.exists()


def test_a_file_that_was_not_written_to_its_end_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    artifact_files.write_tensors(path, {"a": mx.zeros((50,))}, {})
    artifact_files.check_whole(path)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(StageError) as caught:
        artifact_files.check_whole(path)
    said = f"it has {size - 1:,} bytes, its header says {size:,}; "
    assert str(caught.value).startswith(f"a.safetensors: was not written to its end ({said}")


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        artifact_files.write_arrays(tmp_path / "a.safetensors", {"a": np.ones(1, np.float32)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_metadata_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    artifact_files.write_arrays(path, {"a": np.ones(1, np.float32)}, {"context_length": "64", "word": "é"})
    assert artifact_files.read_metadata(path) == {"context_length": "64", "word": "é"}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64", "float32"])
def test_a_mapped_tensor_is_the_file_itself(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.safetensors"
    artifact_files.write_arrays(
        path, {"a": np.arange(5, dtype=dtype), "b": np.arange(12, dtype=dtype).reshape(3, 4)}, {}
    )
    mapped = artifact_files.map_tensor(path, "b")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, load_file(path)["b"])


def test_a_tensor_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    artifact_files.write_arrays(path, {"a": np.ones(1, np.float32)}, {})
    with pytest.raises(ArtifactError) as caught:
        artifact_files.map_tensor(path, "b")
    assert str(caught.value) == f"{path}: has no tensor 'b' of a type that can be mapped. Build it again."


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-3], "it has 81 bytes, its header says 84"),
        (lambda data: data + b"12345", "it has 89 bytes, its header says 84"),
        (lambda data: data[:5], "its header is cut off, or it is no safetensors file"),
        (lambda data: b"", "its header is cut off, or it is no safetensors file"),
        (lambda data: b"\xff" * 40, "its header is cut off, or it is no safetensors file"),
        (lambda data: data[:9] + b"?" + data[10:], "its header is not valid JSON"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: object, said: str) -> None:
    path = tmp_path / "a.safetensors"
    artifact_files.write_arrays(path, {"a": np.ones(1, np.float32)}, {})
    assert path.stat().st_size == 84
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ArtifactError) as caught:
        artifact_files.read_metadata(path)
    assert str(caught.value) == f"{path}: damaged ({said}). Remove it and build it again."


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    for read in (artifact_files.read_metadata, artifact_files.read_report):
        with pytest.raises(ArtifactError) as caught:
            read(tmp_path / "a.safetensors")
        assert str(caught.value) == f"{tmp_path / 'a.safetensors'}: missing. Build it again."


def test_a_report_comes_back(tmp_path: Path) -> None:
    report = {"loss": 1.5, "run": {"seconds": 3}, "models": [{"name": "a"}]}
    artifact_files.write_report(tmp_path / "report.toml", report)
    assert artifact_files.read_report(tmp_path / "report.toml") == report


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_rows_are_written_and_read_one_part_after_the_other(tmp_path: Path, dtype: mx.Dtype) -> None:
    whole = mx.random.normal((2, 5, 3)).astype(dtype)
    flat = whole.reshape(-1, 3)
    with artifact_files.TensorFile(tmp_path / "a.safetensors", {"x": (dtype, (2, 5, 3))}, {}) as file:
        file.put_rows("x", flat[:4])
        file.put_rows("x", flat[4:])
        with pytest.raises(ValueError, match="after 10 rows"):
            file.put_rows("x", flat[:1])
    found = mx.load(str(tmp_path / "a.safetensors"))
    assert isinstance(found, dict)
    assert mx.array_equal(found["x"], whole)
    rows = artifact_files.stored_rows(tmp_path / "a.safetensors")["x"]
    assert mx.array_equal(rows.read(3, 9), flat[3:9])
    assert rows.read(3, 9).dtype == dtype


def test_a_tensor_that_lacks_rows_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="without x"),
        artifact_files.TensorFile(tmp_path / "a.safetensors", {"x": (mx.float32, (4, 3))}, {}) as file,
    ):
        file.put_rows("x", mx.zeros((3, 3)))
