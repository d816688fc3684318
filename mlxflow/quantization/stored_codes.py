"""Codes of several uniform plans in files, read layer by layer: together they are larger than the dense model."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlxflow.quantization.codec import Packed
from mlxflow.quantization.settings import Setting


class StoredCodes:
    """Codes by setting and module path, in a file for each setting; see `in_folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Setting, Path] = {}

    @classmethod
    @contextmanager
    def in_folder(cls, folder: Path) -> "Iterator[StoredCodes]":
        """Yield an empty store in a folder that is removed at the end."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield cls(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, setting: Setting, packed: Mapping[str, Packed]) -> None:
        """Write the codes of layers at a setting."""
        parts = {
            f"{path}.{own}": part
            for path, codes in packed.items()
            for own, part in codes._asdict().items()
            if part is not None
        }
        file = self._folder / f"{len(self._files)}.safetensors"
        mx.save_safetensors(str(file), parts)
        self._files[setting] = file

    def read(self, path: str, setting: Setting) -> Packed:
        """Return the codes of a layer, lazy; the arrays are new ones in each call."""
        tensors: dict[str, mx.array] = mx.load(str(self._files[setting]))  # type: ignore[assignment]
        return Packed(tensors[f"{path}.weight"], tensors[f"{path}.scales"], tensors.get(f"{path}.biases"))
