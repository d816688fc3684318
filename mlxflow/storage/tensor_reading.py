"""Readers of safetensors files: metadata, memory maps, and single rows of a matrix, without reading the rest."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxflow.messages.errors import ArtifactError
from mlxflow.messages.os_errors import naming
from mlxflow.storage.tensor_header import read_safetensors_header
from mlxflow.storage.tensor_types import NUMPY_TYPES, WEIGHT_TYPES

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    metadata = _header(path)[0].get("__metadata__", {})
    return dict(metadata) if isinstance(metadata, dict) else {}


def map_tensor(path: Path, name: str) -> "np.memmap[Any, Any]":
    """Return one tensor of a safetensors file as a memory map, which reads data on access.

    Raises:
        ArtifactError: the file is missing or damaged, or has no such tensor.
    """
    import numpy as np

    header, begin = _header(path)
    entry = header.get(name)
    if not isinstance(entry, dict) or entry.get("dtype") not in NUMPY_TYPES:
        raise ArtifactError(f"{path}: has no tensor {name!r} of a type that can be mapped. Build it again.")
    with naming(path):
        offset = begin + entry["data_offsets"][0]
        return np.memmap(path, NUMPY_TYPES[entry["dtype"]], mode="r", offset=offset, shape=tuple(entry["shape"]))


class StoredRows:
    """A floating-point matrix in a safetensors file, read some rows at a time; made by `stored_rows`.

    All axes except the last count as rows.
    """

    def __init__(self, path: Path, kind: str, width: int, begin: int) -> None:
        self._path = path
        self._numbers, self._dtype = WEIGHT_TYPES[kind]
        self._width = width
        self._begin = begin

    def read(self, begin: int, end: int) -> "mx.array":
        """Return rows, (R, N), in the file's dtype."""
        import mlx.core as mx
        import numpy as np

        count = (end - begin) * self._width
        offset = self._begin + begin * self._width * np.dtype(self._numbers).itemsize
        numbers = np.fromfile(self._path, self._numbers, count, offset=offset)
        return mx.array(numbers).view(getattr(mx, self._dtype)).reshape(-1, self._width)


def stored_rows(path: Path) -> dict[str, StoredRows]:
    """Return the fp32, fp16 and bf16 matrices of a safetensors file by name; only its header is read.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    header, begin = _header(path)
    return {
        name: StoredRows(path, entry["dtype"], entry["shape"][-1], begin + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in WEIGHT_TYPES and len(entry["shape"]) > 1
    }


def tensor_types(path: Path) -> dict[str, str]:
    """Return the type of each tensor in a safetensors file by the format's name; only its header is read.

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
