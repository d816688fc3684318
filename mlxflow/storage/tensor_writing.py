"""Writers of safetensors files: equal arrays, names and metadata give equal bytes.

Use every writer inside a private folder that is published as a whole (`atomic_folders`).
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxflow.messages.byte_sizes import show_apart, show_bytes
from mlxflow.messages.errors import StageError
from mlxflow.messages.os_errors import advise_on, naming
from mlxflow.storage.digests import PROVENANCE_KEY
from mlxflow.storage.host_arrays import numpy_of
from mlxflow.storage.tensor_header import encode_header, read_safetensors_header
from mlxflow.storage.tensor_types import FORMAT_NAMES

if TYPE_CHECKING:
    import mlx.core as mx
    from numpy.typing import NDArray


def write_arrays(path: Path, arrays: Mapping[str, "NDArray[Any]"], metadata: Mapping[str, str]) -> None:
    """Write numpy arrays as a safetensors file: equal arrays and metadata give equal bytes.

    Args:
        path: the file.
        arrays: by name; unsigned, int64 or floating-point; any shape.
        metadata: text by key, kept in the header.
    """
    entries: dict[str, object] = {}
    end = 0
    for name in sorted(arrays):
        begin, end = end, end + arrays[name].nbytes
        dtype = FORMAT_NAMES[arrays[name].dtype.name]
        entries[name] = {"dtype": dtype, "shape": list(arrays[name].shape), "data_offsets": [begin, end]}
    header = encode_header(entries, metadata)
    header += b" " * (-len(header) % 8)
    _require_space(path, 8 + len(header) + end)
    with naming(path), path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in sorted(arrays):
            array = arrays[name]
            file.write(array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).data)


def write_tensors(path: Path, tensors: Mapping[str, "mx.array"], metadata: Mapping[str, str]) -> None:
    """Write MLX arrays as a safetensors file, sorted by name, so that equal tensors give equal bytes.

    Args:
        path: the file; its name ends in `.safetensors`.
        tensors: by name; any shape and dtype.
        metadata: text by key, kept in the header.

    Raises:
        StageError: the free space is too small, or writing failed.
    """
    import mlx.core as mx

    _require_space(path, sum(tensor.nbytes for tensor in tensors.values()))
    ordered = {name: tensors[name] for name in sorted(tensors)}
    try:
        mx.save_safetensors(str(path), ordered, metadata=dict(sorted(metadata.items())))
    except RuntimeError as error:  # MLX's writer does not report the system's reason
        raise _unfinished(path, error) from error


class TensorFile:
    """A safetensors file whose tensors are written one by one, in any order; used in a `with` block.

        with TensorFile(path, {"weight": (mx.bfloat16, (64, 64))}, {"format": "mlx"}) as file:
            file.put("weight", weight)

    The tensors are stored in the order of their names, so that equal tensors give equal bytes.

    Args:
        path: the file.
        entries: dtype and shape of every tensor, by name.
        metadata: text by key, kept in the header.

    Raises:
        StageError: the free space is too small.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple["mx.Dtype", tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self._path = path
        self._offsets: dict[str, int] = {}
        listed: dict[str, object] = {}
        end = 0
        for name in sorted(entries):
            dtype, shape = entries[name]
            begin, end = end, end + dtype.size * math.prod(shape)
            self._offsets[name] = begin
            kind = FORMAT_NAMES[str(dtype).rpartition(".")[2]]
            listed[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
        self._entries = dict(entries)
        self._rows = dict.fromkeys(entries, 0)
        header = encode_header(listed, metadata)
        self._header = header + b" " * (-len(header) % 8)
        self._end = end

    def __enter__(self) -> "TensorFile":
        _require_space(self._path, 8 + len(self._header) + self._end)
        self._file = self._path.open("wb")
        self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def put(self, name: str, tensor: "mx.array") -> None:
        """Write one tensor; its memory may be freed afterwards.

        Raises:
            ValueError: it does not have the declared dtype and shape.
        """
        if (tensor.dtype, tensor.shape) != self._entries[name]:
            raise ValueError(f"{name}: declared {self._entries[name]}, got {(tensor.dtype, tensor.shape)}")
        self._write(name, 0, tensor)

    def put_rows(self, name: str, rows: "mx.array") -> None:
        """Write the next rows of one tensor; all its axes except the last count as rows.

        Args:
            name: of the tensor.
            rows: (R, N).

        Raises:
            ValueError: they do not have the declared dtype and width, or are too many.
        """
        dtype, shape = self._entries[name]
        first = self._rows[name]
        if (rows.dtype, rows.shape[-1]) != (dtype, shape[-1]) or first + len(rows) > math.prod(shape[:-1]):
            raise ValueError(f"{name}: declared {(dtype, shape)}, got {(rows.dtype, rows.shape)} after {first} rows")
        self._write(name, first * shape[-1] * dtype.size, rows)

    def _write(self, name: str, offset: int, rows: "mx.array") -> None:
        with naming(self._path):
            self._file.seek(8 + len(self._header) + self._offsets[name] + offset)
            self._file.write(_raw_bytes(rows))
        self._rows[name] += math.prod(rows.shape[:-1])

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        with naming(self._path):
            self._file.close()
        missing = [name for name, (_, shape) in self._entries.items() if self._rows[name] < math.prod(shape[:-1])]
        if kind is None and missing:
            raise ValueError(f"{self._path}: without {', '.join(sorted(missing))}")


def _raw_bytes(tensor: "mx.array") -> "memoryview[int]":
    """Return the bytes of a tensor, without a copy if it is contiguous."""
    import mlx.core as mx

    # numpy has no bf16, and a view as bytes needs an axis
    flat = mx.contiguous(tensor).reshape(-1)
    return numpy_of(flat if flat.dtype.size == 1 else flat.view(mx.uint8), copy=False).data.cast("B")


def _require_space(path: Path, needed_bytes: int) -> None:
    """Refuse a file that exceeds the free space: MLX's writer does not report a full disk.

    Raises:
        StageError: the free space is too small.
    """
    free = shutil.disk_usage(path.parent).free
    if needed_bytes > free:
        needed, left = show_apart(needed_bytes, free)
        raise StageError(f"{path.name}: needs {needed}, {left} are free in {path.parent.parent}. Make room.")


def check_whole(path: Path) -> None:
    """Check that a safetensors file was written completely.

    Raises:
        StageError: it was not.
    """
    try:
        read_safetensors_header(path)
    except (OSError, ValueError) as error:
        raise _unfinished(path, error) from error


def _unfinished(path: Path, error: Exception) -> StageError:
    free = shutil.disk_usage(path.parent).free
    advice = advise_on(error, "Make room")
    return StageError(f"{path.name}: was not written to its end ({error}; {show_bytes(free)} free). {advice}.")


def provenance_metadata(provenance: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with the provenance of a file; identities leave it out."""
    return {PROVENANCE_KEY: json.dumps(dict(sorted(provenance.items())), separators=(",", ":"))}
