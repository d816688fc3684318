"""Tensors that an interrupted run leaves to the next one: codes of a method, weights of blocks, the state of a tuning.

    NAME-DIGEST.safetensors   the tensors
    NAME.json                 digest of that file, identity of what it depends on, facts

The facts are written last and atomically. So a file of tensors that they name is whole, and a file that they do not
name, which a run began before it was killed, is ignored. Tensors of another identity are not used.
"""

import glob
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import msgspec

from mlxflow.storage import atomic_folders, state_files, temporary_files, tensor_writing
from mlxflow.storage.digests import digest_file
from mlxflow.storage.state_files import InvalidStateError


class FoundTensors(NamedTuple):
    """Tensors that were kept.

    Attributes:
        file: of the tensors.
        tensors: by name, lazy.
        facts: JSON values.
    """

    file: Path
    tensors: dict[str, mx.array]
    facts: dict[str, Any]


class _FileFacts(msgspec.Struct):
    """The contents of the file of the facts.

    Attributes:
        identity: of everything that the tensors depend on.
        digest: of their file.
        facts: JSON values.
    """

    identity: str
    digest: str
    facts: dict[str, Any]


class KeptTensors:
    """Tensors by a name in a folder of one run.

    Args:
        folder: made when something is written.
        identity: of everything that the tensors depend on: others are not used.
        effect: what happens if tensors are damaged, for the message.
    """

    def __init__(self, folder: Path, identity: str, *, effect: str) -> None:
        self._folder, self._identity, self._effect = folder, identity, effect
        temporary_files.remove_orphans(folder)

    def write(self, name: str, tensors: Mapping[str, mx.array], facts: Mapping[str, Any] | None = None) -> Path:
        """Write tensors, and return their file; those of before are there until these are whole.

        Args:
            name: a file name.
            tensors: by name; evaluated here.
            facts: JSON values.

        Raises:
            StageError: the disk is full or cannot be written.
        """
        with atomic_folders.writable(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = temporary_files.beside(self._folder / name, ".tmp.safetensors")
            tensor_writing.write_tensors(temporary, tensors, {})
            digest = digest_file(temporary).content
            file = _file(self._folder, name, digest)
            temporary.replace(file)
            contents = msgspec.structs.asdict(_FileFacts(self._identity, digest, dict(facts or {})))
            atomic_folders.write_whole(_facts_file(self._folder, name), state_files.encode(contents))
            for old in self._files(name):
                if old != file:
                    old.unlink()
        return file

    def read(self, name: str) -> FoundTensors | None:
        """Return tensors; None if there are none of this identity, or if they are damaged, which is reported."""
        try:
            contents = _contents(self._folder, name)
            if contents.identity != self._identity:
                return None
            file = _file(self._folder, name, contents.digest)
            if digest_file(file).content != contents.digest:
                raise InvalidStateError(f"{file.name} is not what was written")
            return FoundTensors(file, _load(file), contents.facts)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RuntimeError) as error:
            state_files.say_ignored(_facts_file(self._folder, name), error, self._effect)
            return None

    def _files(self, name: str) -> list[Path]:
        return list(self._folder.glob(f"{glob.escape(name)}-*.safetensors"))


def unread(folder: Path, name: str) -> dict[str, mx.array]:
    """Return tensors that this run has written or read before, lazy and new ones in each call; empty without."""
    facts = _facts_file(folder, name)
    return _load(_file(folder, name, _contents(folder, name).digest)) if facts.is_file() else {}


def names_kept(folder: Path) -> list[str]:
    """Return the names of what is kept in a folder, which may be missing."""
    return sorted(path.stem for path in folder.glob("*.json"))


def facts_of(folder: Path, name: str) -> dict[str, Any]:
    """Return the facts beside tensors, of any identity and unchecked; empty if there are none."""
    with suppress(OSError, ValueError):
        return _contents(folder, name).facts
    return {}


def _contents(folder: Path, name: str) -> _FileFacts:
    contents = msgspec.convert(state_files.read(_facts_file(folder, name)), _FileFacts)
    if not contents.digest.isalnum():
        raise InvalidStateError("its digest is none")
    return contents


def _facts_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _file(folder: Path, name: str, digest: str) -> Path:
    return folder / f"{name}-{digest}.safetensors"


def _load(file: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(file)))
