"""The cache of tokenized files: one shard for each source file, known by what it was made of.

A shard's name is the digest of the file's content and of every setting that its tokens depend on, never of the
file's name or dates. It is written beside its place and moved there, so a shard that exists is whole; its tensors'
digests are kept in its header and checked before it is used again.
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
# What no run uses any more is kept for reverts while it takes no more room than this or what is used.
_KEPT_UNUSED_BYTES = 1 << 28


def remove_unfinished(folder: Path, pid: int) -> None:
    """Remove what a process that was ended had begun to write into a folder of shards."""
    for path in folder.glob(f".*.{pid}{_PARTIAL_SUFFIX}"):
        path.unlink(missing_ok=True)


class ShardStore:
    """The folder of shards, shared by every pretokenize stage and variant of a workflow.

    Args:
        folder: made when the first shard is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._notes = folder / "notes.json"
        self._known = _read_notes(self._notes)
        self._opened: dict[str, Shard] = {}

    def find(self, key: str) -> Shard | None:
        """Return a shard if it is there and whole; a damaged one is removed.

        One that the file system says did not change since it was last used is not read again.
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
        """Give a writer; when the block ends well the shard is there, else nothing is left."""
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
        """Return a shard that was just written or found."""
        return self._opened.get(key) or open_shard(self._path(key))[0]

    def collect(self, task: str, used: Iterable[str], live: Iterable[str]) -> int:
        """Note what a stage uses, and remove the oldest of what no stage uses any more; return how many.

        Unused shards are kept, so that a revert costs nothing, while together they are no larger than those in use
        (or a quarter of a gigabyte).

        Args:
            task: the stage.
            used: keys of its shards.
            live: the stages that there are; what others used is unused.
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
    """Return what the file system says of a file; equal stamps mean an unchanged file."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


class _Notes(msgspec.Struct):
    """What is remembered of shards: of each stage those it uses, when each was used last, and what `_stamp` said."""

    runs: Annotated[int, msgspec.Meta(ge=0, lt=2**62)] = 0
    tasks: dict[str, list[str]] = {}
    used_in: dict[str, int] = {}
    stamps: dict[str, list[int]] = {}


def _read_notes(path: Path) -> dict[str, Any]:
    """Return what is remembered of shards; it is only a shortcut, so a damaged file is as good as none."""
    try:
        known = msgspec.convert(state_files.parse_json(state_files.read_bytes(path)), _Notes)
    except (OSError, ValueError) as error:
        known = _Notes()
        if not isinstance(error, FileNotFoundError):
            state_files.say_ignored(path, error, "Shards are read again.")
    return msgspec.structs.asdict(known)
