"""Codes in files, read layer by layer when they are used: those of a whole model, and those of several plans."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlxflow.quantization.codec import Packed
from mlxflow.quantization.settings import Setting

# Codes that are collected before a file is written: an unread model keeps all its files open
_FILE_BYTES = 256 << 20


class CodesOnDisk:
    """Codes of layers in files of a folder, each written once and read when it is used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Path] = []

    def kept(self, packed: Mapping[str, Packed]) -> dict[str, Packed]:
        """Write the codes of some layers, and return them unread."""
        if not packed:
            return {}
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"codes-{len(self._files)}.safetensors"
        _write(file, packed)
        self._files.append(file)
        return _unread(file)

    def gather(self, codes: Iterable[tuple[str, Packed]]) -> None:
        """Write the codes of layers one after the other, several of them in a file.

        Args:
            codes: by path, evaluated here one at a time.
        """
        part: dict[str, Packed] = {}
        for path, one in codes:
            mx.eval(one)
            part[path] = one
            if sum(codes.nbytes for codes in part.values()) >= _FILE_BYTES:
                self.kept(part)
                part.clear()
        self.kept(part)

    def unread(self) -> dict[str, Packed]:
        """Return the codes of all layers, lazy; the arrays are new ones in each call."""
        return {path: codes for file in self._files for path, codes in _unread(file).items()}

    def remove(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._files.clear()


class StoredCodes:
    """Codes by setting and module path, in files of a folder for each setting; see `in_folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stores: dict[Setting, CodesOnDisk] = {}

    @classmethod
    @contextmanager
    def in_folder(cls, folder: Path) -> "Iterator[StoredCodes]":
        """Yield an empty store in a folder that is removed at the end."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield cls(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, setting: Setting, codes: Iterable[tuple[str, Packed]]) -> None:
        """Write the codes of layers at a setting; see `CodesOnDisk.gather`."""
        self._stores[setting] = CodesOnDisk(self._folder / str(len(self._stores)))
        self._stores[setting].gather(codes)

    def read(self, path: str, setting: Setting) -> Packed:
        """Return the codes of a layer, lazy; the arrays are new ones in each call."""
        return self._stores[setting].unread()[path]


def emptied(packed: dict[str, Packed]) -> Iterator[tuple[str, Packed]]:
    """Yield codes by path, and remove each from the dictionary before it is used."""
    for path in list(packed):
        yield path, packed.pop(path)


def _write(file: Path, packed: Mapping[str, Packed]) -> None:
    parts = {
        f"{path}.{own}": part
        for path, codes in packed.items()
        for own, part in codes._asdict().items()
        if part is not None
    }
    mx.save_safetensors(str(file), parts)


def _unread(file: Path) -> dict[str, Packed]:
    tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    paths = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    return {
        path: Packed(tensors[f"{path}.weight"], tensors[f"{path}.scales"], tensors.get(f"{path}.biases"))
        for path in paths
    }
