"""Hidden states between blocks in files, for rows that need not fit into memory, and finished blocks: a run resumes.

For the input of block i there are two files, of the dense model and of the quantized one. A finished block is a file of
its codes, written after the inputs of the next block; a run that was killed begins with the first block without one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxflow.messages.errors import ArtifactError
from mlxflow.quantization.codec import Packed
from mlxflow.storage import temporary_files
from mlxflow.storage.tensor_reading import StoredRows, read_metadata, stored_rows
from mlxflow.storage.tensor_writing import TensorFile

_KINDS = ("dense", "quantized", "gradient")
_NAME, _KEY, _ERRORS = "hidden", "key", "errors"


def count_finished(folder: Path) -> int:
    """Return the number of blocks that an earlier run finished in a folder, which may be missing."""
    number = 0
    while _block_file(folder, number).is_file():
        number += 1
    return number


def _block_file(folder: Path, number: int) -> Path:
    return folder / f"block-{number}.safetensors"


class FinishedBlock(NamedTuple):
    """A block whose layers are packed.

    Attributes:
        packed: codes by module path, read from the file when they are used.
        errors: relative squared errors of its outputs: before training, after it, and on all rows.
    """

    packed: dict[str, Packed]
    errors: tuple[float, ...]


class HiddenStreams:
    """Files of hidden states and of finished blocks in a folder.

    Args:
        folder: made if it is missing.
        key: of everything that the files depend on; files with another key are removed.
        num_rows: R.
        context_length: L.
        at_once: rows that are computed and written together.
    """

    def __init__(self, folder: Path, *, key: str, num_rows: int, context_length: int, at_once: int) -> None:
        self.num_rows, self.context_length, self.at_once = num_rows, context_length, at_once
        self._folder, self._key = folder, key
        self._open: dict[Path, StoredRows] = {}
        folder.mkdir(parents=True, exist_ok=True)
        temporary_files.remove_orphans(folder)
        for file in folder.glob("*.safetensors"):
            with suppress(ArtifactError):
                if read_metadata(file).get(_KEY) == key:
                    continue
            file.unlink()

    @property
    def next_block(self) -> int:
        """The number of the first block that is not finished."""
        return count_finished(self._folder)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the first row, and one past the last, of each part that is computed together."""
        for begin in range(0, self.num_rows, self.at_once):
            yield begin, min(begin + self.at_once, self.num_rows)

    def read(self, kind: str, number: int, rows: Sequence[int] | np.ndarray) -> mx.array:
        """Return inputs of a block, (B, L, D), for rows of some numbers.

        Args:
            kind: "dense", "quantized", or "gradient" for what a backward pass gives.
            number: of the block.
            rows: numbers.
        """
        file = self._stream_file(kind, number)
        if file not in self._open:
            self._open[file] = stored_rows(file)[_NAME]
        stored, length = self._open[file], self.context_length
        return mx.stack([stored.read(int(row) * length, (int(row) + 1) * length) for row in rows])

    def write(self, kind: str, number: int, part: Callable[[int, int], mx.array]) -> None:
        """Write the inputs of a block.

        Args:
            kind: see `read`.
            number: of the block.
            part: returns those of consecutive rows, (B, L, D).
        """
        spans = list(self.spans())
        first = part(*spans[0])
        file = self._stream_file(kind, number)
        temporary = temporary_files.beside(file)
        entries = {_NAME: (first.dtype, (self.num_rows, *first.shape[1:]))}
        with TensorFile(temporary, entries, {_KEY: self._key}) as out:
            for place, span in enumerate(spans):
                hidden = part(*span) if place else first
                out.put_rows(_NAME, hidden.reshape(-1, hidden.shape[-1]))
        temporary.replace(file)
        self._open.pop(file, None)

    def finish(self, number: int, packed: Mapping[str, Packed], errors: Sequence[float]) -> None:
        """Write the codes of a block, and remove the files of its inputs.

        Args:
            number: of the block.
            packed: codes by module path.
            errors: see `FinishedBlock`.
        """
        tensors = {
            f"{path}.{own}": part
            for path, codes in packed.items()
            for own, part in codes._asdict().items()
            if part is not None
        }
        file = _block_file(self._folder, number)
        temporary = temporary_files.beside(file)
        metadata = {_KEY: self._key, _ERRORS: " ".join(map(repr, errors))}
        with TensorFile(temporary, {name: (one.dtype, one.shape) for name, one in tensors.items()}, metadata) as out:
            for name, tensor in tensors.items():
                out.put(name, tensor)
        temporary.replace(file)
        self.remove_inputs(number)

    def finished(self, number: int) -> FinishedBlock:
        """Return a finished block; its codes are lazy."""
        file = _block_file(self._folder, number)
        tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        paths = dict.fromkeys(name.removesuffix(".weight") for name in tensors if name.endswith(".weight"))
        packed = {
            path: Packed(tensors[f"{path}.weight"], tensors[f"{path}.scales"], tensors.get(f"{path}.biases"))
            for path in paths
        }
        return FinishedBlock(packed, tuple(map(float, read_metadata(file)[_ERRORS].split())))

    def remove_inputs(self, number: int) -> None:
        """Remove the files of a block's inputs."""
        for kind in _KINDS:
            file = self._stream_file(kind, number)
            self._open.pop(file, None)
            file.unlink(missing_ok=True)

    def _stream_file(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}-{number}.safetensors"
