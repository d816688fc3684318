"""The cache of tokenized files: one shard for each source file, identified by its inputs.

A shard's name is the digest of the file's content and of every setting that its tokens depend on, never of the
file's name or dates. It is written to a temporary name and moved, so an existing shard is complete; the digests of
its tensors are in its header and checked before reuse.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from mlxflow.data.shard import Shard, ShardWriter, open_shard
from mlxflow.storage import state_files
from mlxflow.storage.array_stream import ArrayStream
from mlxflow.storage.atomic_folders import write_whole
from mlxflow.storage.digests import tensor_digests

_SUFFIX = ".safetensors"
_PARTIAL_SUFFIX = ".partial"
_HEADER_BYTES = 4088
# Unused shards are kept, for reverts, up to this size or the size of the used ones.
_KEPT_UNUSED_BYTES = 1 << 28


def remove_unfinished(folder: Path, pid: int) -> None:
    """Remove the unfinished shards of an ended process from a folder."""
    for path in folder.glob(f".*.{pid}{_PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


class ShardStore:
    """The folder of shards, shared by every pretokenize stage and variant of a workflow.

    Args:
        folder: created when the first shard is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._notes = folder / "notes.json"
        self._known = _read_notes(self._notes)
        self._opened: dict[str, Shard] = {}

    def find(self, key: str) -> Shard | None:
        """Return a shard if it exists and is intact; a damaged one is removed.

        One whose size and times are unchanged since its last use is not read again.
        """
        path = self._path(key)
        try:
            stamp = _stamp(path)
        except FileNotFoundError:
            return None
        try:
            shard, digests = open_shard(path)
            is_known = self._known["stamps"].get(key) == stamp
            if is_known or {name: found[2] for name, found in tensor_digests(path).items()} == digests:
                self._known["stamps"][key] = stamp
                self._opened[key] = shard
                return shard
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass
        path.unlink(missing_ok=True)
        return None

    @contextmanager
    def write(self, key: str, dtype: "np.dtype[Any]") -> Iterator[ShardWriter]:
        """Yield a writer; the shard is published if the block succeeds, else removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        columns = {"tokens": (dtype.name, ()), "documents": ("uint64", (7,)), "spans": ("int64", (2,))}
        temporary = self._folder / f".{key}.{os.getpid()}{_PARTIAL_SUFFIX}"
        try:
            with ArrayStream(temporary, columns, header_bytes=_HEADER_BYTES) as stream:
                writer = ShardWriter(stream, columns)
                yield writer
                writer.finish()
            temporary.replace(self._path(key))
            self._known["stamps"][key] = _stamp(self._path(key))
        finally:
            temporary.unlink(missing_ok=True)

    def open(self, key: str) -> Shard:
        """Return a shard that `write` or `find` has just confirmed."""
        return self._opened.get(key) or open_shard(self._path(key))[0]

    def collect(self, task: str, used: Iterable[str], live: Iterable[str]) -> int:
        """Record the shards that a stage uses, and remove the oldest unused ones; return their number.

        Unused shards are kept for reverts up to the total size of those in use (or a quarter of a gigabyte).

        Args:
            task: the stage.
            used: keys of its shards.
            live: the existing stages; shards of other stages count as unused.
        """
        known = self._known
        known["runs"] += 1
        known["tasks"] = {name: keys for name, keys in known["tasks"].items() if name in set(live)}
        known["tasks"][task] = sorted(set(used))
        in_use = {key for keys in known["tasks"].values() for key in keys}
        known["used_in"] |= dict.fromkeys(in_use, known["runs"])
        used_bytes, unused = 0, []
        for entry in os.scandir(self._folder):
            key = entry.name.removesuffix(_SUFFIX)
            if entry.name.endswith(_PARTIAL_SUFFIX):
                os.unlink(entry.path)  # noqa: PTH108 - what a crash left behind
            elif key != entry.name:
                status = entry.stat()
                if key in in_use:
                    used_bytes += status.st_size
                else:
                    unused.append((known["used_in"].get(key, 0), status.st_mtime_ns, status.st_size, key))
        room, removed = max(used_bytes, _KEPT_UNUSED_BYTES), set()
        for _, _, size, key in sorted(unused, reverse=True):
            room -= size
            if room < 0:
                self._path(key).unlink()
                removed.add(key)
        for name in ("stamps", "used_in"):
            known[name] = {key: value for key, value in known[name].items() if key not in removed}
        write_whole(self._notes, json.dumps(known).encode())
        return len(removed)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


def _stamp(path: Path) -> list[int]:
    """Return size and times of a file; equal stamps mean an unchanged file."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


class _Notes(msgspec.Struct):
    """The stored notes about shards: the ones each stage uses, the last use of each, and its `_stamp`."""

    runs: Annotated[int, msgspec.Meta(ge=0, lt=2**62)] = 0
    tasks: dict[str, list[str]] = {}
    used_in: dict[str, int] = {}
    stamps: dict[str, list[int]] = {}


def _read_notes(path: Path) -> dict[str, Any]:
    """Return the stored notes about shards; without them shards are only read again, so a damaged file is ignored."""
    try:
        known = msgspec.convert(state_files.parse_json(state_files.read_bytes(path)), _Notes)
    except (OSError, ValueError) as error:
        known = _Notes()
        if not isinstance(error, FileNotFoundError):
            state_files.say_ignored(path, error, "Shards are read again.")
    return msgspec.structs.asdict(known)
