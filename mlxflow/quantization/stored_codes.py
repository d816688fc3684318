"""Codes in files, read layer by layer when they are used: those of a whole model, and those of several plans."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlxflow.quantization.codec import Packed
from mlxflow.quantization.settings import Setting


class CodesOnDisk:
    """Codes of layers in files of a folder, each written once and read when it is used."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def kept(self, packed: Mapping[str, Packed]) -> dict[str, Packed]:
        """Write the codes of some layers, and return them unread."""
        if not packed:
            return {}
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"codes-{self._count}.safetensors"
        self._count += 1
        _write(file, packed)
        tensors = _unread(file)
        return {path: _codes_of(tensors, path) for path in packed}


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
        file = self._folder / f"{len(self._files)}.safetensors"
        _write(file, packed)
        self._files[setting] = file

    def read(self, path: str, setting: Setting) -> Packed:
        """Return the codes of a layer, lazy; the arrays are new ones in each call."""
        return _codes_of(_unread(self._files[setting]), path)


def _write(file: Path, packed: Mapping[str, Packed]) -> None:
    parts = {
        f"{path}.{own}": part
        for path, codes in packed.items()
        for own, part in codes._asdict().items()
        if part is not None
    }
    mx.save_safetensors(str(file), parts)


def _unread(file: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    return tensors


def _codes_of(tensors: Mapping[str, mx.array], path: str) -> Packed:
    return Packed(tensors[f"{path}.weight"], tensors[f"{path}.scales"], tensors.get(f"{path}.biases"))
