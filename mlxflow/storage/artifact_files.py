"""The only reader and writer of artifacts: safetensors files, reports, and the folder that is moved into place whole.

A file that exists is a file that is finished: a stage writes into a private folder beside its artifact, every byte is
flushed to the disk, and then the folder takes the artifact's place in one step. Until then the old artifact serves.
"""

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxflow.errors import ArtifactError, StageError
from mlxflow.storage import toml_text
from mlxflow.storage.atomic_folders import partial_folders as partial_folders
from mlxflow.storage.atomic_folders import publishing as publishing
from mlxflow.storage.atomic_folders import remove_folder as remove_folder
from mlxflow.storage.atomic_folders import writable as writable
from mlxflow.storage.atomic_folders import write_whole as write_whole
from mlxflow.storage.digests import PROVENANCE_KEY, read_safetensors_header
from mlxflow.storage.regular_files import read_regular
from mlxflow.system.os_errors import advise_on, naming

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    from numpy.typing import NDArray

# safetensors' names of the types that numpy has, by numpy's names, and the other way round
_SAFETENSORS_NAMES = {
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int64": "I64",
    "float32": "F32",
}

# the same by MLX's names
#: Types of the format that MLX does not read.
UNREAD_TYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F64"})

# What numpy reads a type as, and what MLX calls it
_FLOATING = {"F32": ("<u4", "float32"), "F16": ("<u2", "float16"), "BF16": ("<u2", "bfloat16")}

_MLX_NAMES = {"bool": "BOOL", "int8": "I8", "int16": "I16", "int32": "I32", "float16": "F16", "bfloat16": "BF16"}
_MLX_NAMES |= _SAFETENSORS_NAMES
_NUMPY_NAMES = {name: numpy_name for numpy_name, name in _SAFETENSORS_NAMES.items()}


# --- safetensors


def write_arrays(path: Path, arrays: Mapping[str, "NDArray[Any]"], metadata: Mapping[str, str]) -> None:
    """Write numpy arrays as a safetensors file: the same arrays and metadata are the same bytes.

    Args:
        path: the file.
        arrays: by name; unsigned, int64 or floating; any shape.
        metadata: text by key, kept in the header.
    """
    entries: dict[str, object] = {}
    end = 0
    for name in sorted(arrays):
        begin, end = end, end + arrays[name].nbytes
        dtype = _SAFETENSORS_NAMES[arrays[name].dtype.name]
        entries[name] = {"dtype": dtype, "shape": list(arrays[name].shape), "data_offsets": [begin, end]}
    header = _header_json(entries, metadata)
    header += b" " * (-len(header) % 8)
    _require_space(path, 8 + len(header) + end)
    with naming(path), path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in sorted(arrays):
            array = arrays[name]
            file.write(array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).data)


class ArrayStream:
    """Writes a safetensors file whose arrays grow at their ends, in little memory; used in a `with` block.

    The first column goes straight into the file, after room for a header; the others wait beside it, in memory as long
    as they are short. The header is written last, so a file that was not finished has none.

        with ArrayStream(path, {"tokens": ("uint16", (513,)), "lengths": (None, ())}) as stream:
            stream.append("tokens", rows)
            stream.metadata["rows"] = "10"

    Args:
        path: the file.
        columns: by name, in the order of the file: type and shape of one entry. None is the smallest unsigned type that
            holds every value; not for the first column.
        header_bytes: room for names, shapes and metadata.

    Attributes:
        metadata: text by key, written at the end.
    """

    _SPOOLED_BYTES = 1 << 22

    def __init__(
        self, path: Path, columns: Mapping[str, tuple[str | None, tuple[int, ...]]], *, header_bytes: int = 8184
    ) -> None:
        import numpy as np

        self.metadata: dict[str, str] = {}
        self._path = path
        self._shapes = {name: shape for name, (_, shape) in columns.items()}
        self._dtypes = {name: np.dtype(dtype or "uint8").newbyteorder("<") for name, (dtype, _) in columns.items()}
        self._growing = {name for name, (dtype, _) in columns.items() if dtype is None}
        self._header_bytes = header_bytes
        self._lengths = dict.fromkeys(columns, 0)

    def __enter__(self) -> "ArrayStream":
        first, *others = self._shapes
        self._file = self._path.open("wb")
        self._file.write(bytes(8 + self._header_bytes))
        self._parts: dict[str, Any] = {first: self._file}
        self._parts |= {name: self._wait_room() for name in others}
        return self

    def _wait_room(self) -> Any:
        import tempfile

        return tempfile.SpooledTemporaryFile(
            max_size=self._SPOOLED_BYTES, dir=str(self._path.parent), prefix=f".{self._path.name}."
        )

    def append(self, name: str, array: "NDArray[Any]") -> None:
        """Add entries, (N, ...), to a column."""
        import numpy as np

        if array.shape[1:] != self._shapes[name]:
            raise ValueError(f"{name}: expected entries of shape {self._shapes[name]}, got {array.shape[1:]}")
        if not array.size:
            return
        if name in self._growing and (needed := np.min_scalar_type(int(array.max()))) > self._dtypes[name]:
            self._widen(name, needed.newbyteorder("<"))
        with naming(self._path):
            self._parts[name].write(np.ascontiguousarray(array, self._dtypes[name]).data.cast("B"))
        self._lengths[name] += len(array)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        with naming(self._path), ExitStack() as parts:
            for part in self._parts.values():
                parts.callback(part.close)
            if kind is None:
                self._finish()

    def _widen(self, name: str, dtype: "np.dtype[Any]") -> None:
        """Keep a column in a wider type from now on."""
        import numpy as np

        narrow, wide = self._parts[name], self._wait_room()
        narrow.seek(0)
        while chunk := narrow.read(1 << 22):
            wide.write(np.frombuffer(chunk, self._dtypes[name]).astype(dtype).data.cast("B"))
        narrow.close()
        self._parts[name], self._dtypes[name] = wide, dtype

    def _finish(self) -> None:
        entries: dict[str, object] = {}
        end = 0
        for name, shape in self._shapes.items():
            part, dtype = self._parts[name], self._dtypes[name]
            if part is not self._file:
                part.seek(0)
                shutil.copyfileobj(part, self._file, 1 << 22)
            begin, end = end, end + self._lengths[name] * dtype.itemsize * math.prod(shape)
            entries[name] = {
                "dtype": _SAFETENSORS_NAMES[dtype.name],
                "shape": [self._lengths[name], *shape],
                "data_offsets": [begin, end],
            }
        header = _header_json(entries, self.metadata)
        if len(header) > self._header_bytes:
            raise ValueError(f"the header needs {len(header)} bytes, {self._header_bytes} were kept for it")
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))


def _header_json(entries: Mapping[str, object], metadata: Mapping[str, str]) -> bytes:
    # The safetensors library writes metadata in the order of a hash table, another one in each process.
    header = {"__metadata__": dict(sorted(metadata.items())), **entries}
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


def write_tensors(path: Path, tensors: Mapping[str, "mx.array"], metadata: Mapping[str, str]) -> None:
    """Write MLX arrays as a safetensors file: names in sorted order, so that equal tensors are equal bytes.

    Args:
        path: the file; its name ends in `.safetensors`.
        tensors: by name; any shape and type.
        metadata: text by key, kept in the header.

    Raises:
        StageError: the disk has less room than the file needs, or writing it failed.
    """
    import mlx.core as mx

    _require_space(path, sum(tensor.nbytes for tensor in tensors.values()))
    ordered = {name: tensors[name] for name in sorted(tensors)}
    try:
        mx.save_safetensors(str(path), ordered, metadata=dict(sorted(metadata.items())))
    except RuntimeError as error:  # MLX's writer keeps the system's reason to itself
        raise _unfinished(path, error) from error


class TensorFile:
    """A safetensors file whose tensors come one by one, in any order; used in a `with` block.

        with TensorFile(path, {"weight": (mx.bfloat16, (64, 64))}, {"format": "mlx"}) as file:
            file.put("weight", weight)

    The tensors lie in the order of their names, so that equal tensors are equal bytes.

    Args:
        path: the file.
        entries: type and shape of every tensor, by name.
        metadata: text by key, kept in the header.

    Raises:
        StageError: the disk has less room than the file needs.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple["mx.Dtype", tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self._path = path
        self._offsets: dict[str, int] = {}
        told: dict[str, object] = {}
        end = 0
        for name in sorted(entries):
            dtype, shape = entries[name]
            begin, end = end, end + dtype.size * math.prod(shape)
            self._offsets[name] = begin
            kind = _MLX_NAMES[str(dtype).rpartition(".")[2]]
            told[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
        self._entries = dict(entries)
        self._rows = dict.fromkeys(entries, 0)
        header = _header_json(told, metadata)
        self._header = header + b" " * (-len(header) % 8)
        self._end = end

    def __enter__(self) -> "TensorFile":
        _require_space(self._path, 8 + len(self._header) + self._end)
        self._file = self._path.open("wb")
        self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def put(self, name: str, tensor: "mx.array") -> None:
        """Write one of the tensors; its memory may be given back afterwards.

        Raises:
            ValueError: it is not of the type and shape that were told.
        """
        if (tensor.dtype, tensor.shape) != self._entries[name]:
            raise ValueError(f"{name}: told {self._entries[name]}, got {(tensor.dtype, tensor.shape)}")
        self._write(name, 0, tensor)

    def put_rows(self, name: str, rows: "mx.array") -> None:
        """Write the next rows of one of the tensors, all of whose axes but the last count as rows.

        Args:
            name: of the tensor.
            rows: (R, N).

        Raises:
            ValueError: they are not of the type and width that were told, or too many.
        """
        dtype, shape = self._entries[name]
        first = self._rows[name]
        if (rows.dtype, rows.shape[-1]) != (dtype, shape[-1]) or first + len(rows) > math.prod(shape[:-1]):
            raise ValueError(f"{name}: told {(dtype, shape)}, got {(rows.dtype, rows.shape)} after {first} rows")
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
    """Return the bytes of a tensor without a copy where it lies in one piece."""
    import mlx.core as mx
    import numpy as np

    # numpy has no bf16, and what is viewed as bytes needs an axis
    flat = mx.contiguous(tensor).reshape(-1)
    return np.array(flat if flat.dtype.size == 1 else flat.view(mx.uint8), copy=False).data.cast("B")


def _require_space(path: Path, needed_bytes: int) -> None:
    """Refuse to begin a file that will not fit: MLX's writer does not notice a full disk.

    Raises:
        StageError: there is less room than the file needs.
    """
    free = shutil.disk_usage(path.parent).free
    if needed_bytes > free:
        raise StageError(
            f"{path.name}: needs {needed_bytes:,} bytes, {free:,} are free in {path.parent.parent}. Make room."
        )


def check_whole(path: Path) -> None:
    """Make sure that a safetensors file was written to its end.

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
    return StageError(f"{path.name}: was not written to its end ({error}; {free:,} bytes free). {advice}.")


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    metadata = _header(path)[0].get("__metadata__", {})
    return dict(metadata) if isinstance(metadata, dict) else {}


def map_tensor(path: Path, name: str) -> "np.memmap[Any, Any]":
    """Return one tensor of a safetensors file as a memory map: nothing is read until it is looked at.

    Raises:
        ArtifactError: the file is missing or damaged, or has no such tensor.
    """
    import numpy as np

    header, begin = _header(path)
    entry = header.get(name)
    if not isinstance(entry, dict) or entry.get("dtype") not in _NUMPY_NAMES:
        raise ArtifactError(f"{path}: has no tensor {name!r} of a type that can be mapped. Build it again.")
    dtype = np.dtype(_NUMPY_NAMES[entry["dtype"]]).newbyteorder("<")
    with naming(path):
        return np.memmap(path, dtype, mode="r", offset=begin + entry["data_offsets"][0], shape=tuple(entry["shape"]))


class StoredRows:
    """A matrix of floating numbers in a safetensors file, read some rows at a time; `stored_rows` makes them.

    All of its axes but the last count as rows.
    """

    def __init__(self, path: Path, kind: str, width: int, begin: int) -> None:
        self._path = path
        self._numbers, self._dtype = _FLOATING[kind]
        self._width = width
        self._begin = begin

    def read(self, begin: int, end: int) -> "mx.array":
        """Return rows, (R, N), in the file's type."""
        import mlx.core as mx
        import numpy as np

        count = (end - begin) * self._width
        offset = self._begin + begin * self._width * np.dtype(self._numbers).itemsize
        numbers = np.fromfile(self._path, self._numbers, count, offset=offset)
        return mx.array(numbers).view(getattr(mx, self._dtype)).reshape(-1, self._width)


def stored_rows(path: Path) -> dict[str, StoredRows]:
    """Return the matrices of fp32, fp16 or bf16 in a safetensors file, by name; only its header is read.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    header, begin = _header(path)
    return {
        name: StoredRows(path, entry["dtype"], entry["shape"][-1], begin + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _FLOATING and len(entry["shape"]) > 1
    }


def tensor_types(path: Path) -> dict[str, str]:
    """Return the type of each tensor in a safetensors file, as the format calls it; only its header is read.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    return {name: entry["dtype"] for name, entry in _header(path)[0].items() if name != "__metadata__"}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        return read_safetensors_header(path)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing. Build it again.") from error
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged ({error}). Remove it and build it again.") from error


def provenance_metadata(provenance: Mapping[str, str]) -> dict[str, str]:
    """Return the header entry that tells where a file came from; `identity` leaves it out."""
    return {PROVENANCE_KEY: json.dumps(dict(sorted(provenance.items())), separators=(",", ":"))}


# --- reports


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as TOML. What differs between equal runs belongs in its `[run]` table."""
    import tomli_w

    write_whole(path, tomli_w.dumps(report).encode())


def read_report(path: Path) -> dict[str, Any]:
    """Return a report.

    Raises:
        ArtifactError: it is missing or no valid TOML.
    """
    try:
        with naming(path):
            return toml_text.loads(read_regular(path).decode())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing. Build it again.") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged ({error}). Remove it and build it again.") from error
