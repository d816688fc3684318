"""A writer of safetensors files whose arrays are appended to: token files and shards."""

import math
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxflow.messages.os_errors import naming
from mlxflow.storage.tensor_header import encode_header
from mlxflow.storage.tensor_types import FORMAT_NAMES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class ArrayStream:
    """Writes a safetensors file whose arrays are appended to, in little memory; used in a `with` block.

    The first column is written directly to the file, after space for a header; the others to temporary files, or to
    memory while they are short. The header is written last, so an unfinished file has none.

        with ArrayStream(path, {"tokens": ("uint16", (513,)), "lengths": (None, ())}) as stream:
            stream.append("tokens", rows)
            stream.metadata["rows"] = "10"

    Args:
        path: the file.
        columns: by name, in the order of the file: type and shape of one entry. None means the smallest unsigned type
            that holds every value; not for the first column.
        header_bytes: space for names, shapes and metadata.

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
        """Convert a column to a wider type."""
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
                "dtype": FORMAT_NAMES[dtype.name],
                "shape": [self._lengths[name], *shape],
                "data_offsets": [begin, end],
            }
        header = encode_header(entries, self.metadata)
        if len(header) > self._header_bytes:
            raise ValueError(f"the header needs {len(header)} bytes, {self._header_bytes} were kept for it")
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
