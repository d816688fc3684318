from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlxflow.messages.errors import ArtifactError
from mlxflow.storage import tensor_reading, tensor_writing


def test_read_metadata_returns_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor_writing.write_arrays(path, {"a": np.ones(1, np.float32)}, {"context_length": "64", "word": "é"})
    assert tensor_reading.read_metadata(path) == {"context_length": "64", "word": "é"}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64", "float32"])
def test_map_tensor_maps_the_file(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.safetensors"
    tensor_writing.write_arrays(
        path, {"a": np.arange(5, dtype=dtype), "b": np.arange(12, dtype=dtype).reshape(3, 4)}, {}
    )
    mapped = tensor_reading.map_tensor(path, "b")
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, load_file(path)["b"])


def test_map_tensor_of_a_missing_name_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor_writing.write_arrays(path, {"a": np.ones(1, np.float32)}, {})
    with pytest.raises(ArtifactError) as caught:
        tensor_reading.map_tensor(path, "b")
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
    tensor_writing.write_arrays(path, {"a": np.ones(1, np.float32)}, {})
    assert path.stat().st_size == 84
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ArtifactError) as caught:
        tensor_reading.read_metadata(path)
    assert str(caught.value) == f"{path}: damaged ({said}). Remove it and build it again."


def test_a_missing_safetensors_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        tensor_reading.read_metadata(tmp_path / "a.safetensors")
    assert str(caught.value) == f"{tmp_path / 'a.safetensors'}: missing. Build it again."
