"""The cache of tokenized files: one shard for each source file, known by what it was made of.

A shard's name is the digest of the file's content and of every setting that its tokens depend on, never of the
file's name or dates. It is written beside its place and moved there, so a shard that exists is whole; its tensors'
digests are kept in its header and checked before it is used again.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from mlxflow.storage import state_files
from mlxflow.storage.artifact_files import ArrayStream, write_whole
from mlxflow.storage.digests import read_safetensors_header, tensor_digests

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Raised when shards that earlier code wrote are wrong now.
FORMAT = 3

#: Of a document's flags: it is a conversation; only its spans are trained on.
CONVERSATION, MASKED = 1, 2

_SUFFIX = ".safetensors"
_PARTIAL_SUFFIX = ".partial"
_HEADER_BYTES = 4088
# What no run uses any more is kept for reverts while it takes no more room than this or what is used.
_KEPT_UNUSED_BYTES = 1 << 28
_SPAN_TOKENS = 1 << 20


class Documents(NamedTuple):
    """What is known of the documents of a shard.

    Attributes:
        table: (D, 7) of each its length in tokens, the two halves of the xxh3-128 of what the file says, its size in
            UTF-8 bytes, its place (a line or number), its flags and how many spans it has.
    """

    table: "NDArray[np.uint64]"

    @property
    def lengths(self) -> "NDArray[np.int64]":
        """Of each document in tokens, (D,)."""
        return self.table[:, 0].astype(np.int64)

    @property
    def hashes(self) -> "NDArray[np.uint64]":
        """The two halves of each digest, (D, 2)."""
        return self.table[:, 1:3]

    @property
    def sizes(self) -> "NDArray[np.uint64]":
        """Of each text in UTF-8 bytes, (D,)."""
        return self.table[:, 3]

    @property
    def places(self) -> "NDArray[np.uint64]":
        """The line of each document, or its number in the file, (D,)."""
        return self.table[:, 4]

    @property
    def flags(self) -> "NDArray[np.uint64]":
        """CONVERSATION, MASKED, both or none, (D,)."""
        return self.table[:, 5]

    @property
    def span_counts(self) -> "NDArray[np.int64]":
        """Of how many spans each document is trained on, (D,)."""
        return self.table[:, 6].astype(np.int64)


class Shard(NamedTuple):
    """The tokens of one source file and what is known of its documents.

    Columns: `tokens` (T,), `documents` (D, 7), see `Documents`, and `spans` (S, 2), the tokens trained on, relative to
    their document, of those documents that are MASKED.

    Attributes:
        path: the file.
        begin: where its tensors begin in the file.
        columns: type, shape and offset of each column.
        blank: documents left out because there is no text in them.
        masked: documents left out because no token of theirs is trained on.
        bad: records left out: (place, reason), the first of them.
        num_bad: how many they are.
        problem: why the whole file is left out, or "".
        is_binary: whether that is because it is no text.
        end_tokens: ids that end what is trained on of a conversation.
        inner_tokens: those of them that stand inside of it too.
        added_ends: conversations behind which an end of text was put because nothing else ended them.
        literals: conversations with control tokens that are text.
    """

    path: Path
    begin: int
    columns: dict[str, tuple[str, tuple[int, ...], int]]
    blank: int
    masked: int
    bad: list[tuple[int, str]]
    num_bad: int
    problem: str
    is_binary: bool
    end_tokens: list[int]
    inner_tokens: list[int]
    added_ends: int
    literals: int

    @property
    def num_documents(self) -> int:
        """D."""
        return self.columns["documents"][1][0]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.columns["tokens"][1][0]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> "NDArray[Any]":
        """Return entries of a column, read from the file; memory maps would count as the process's memory."""
        dtype, shape, offset = self.columns[name]
        end = shape[0] if end is None else end
        item = np.dtype(dtype).itemsize * int(np.prod(shape[1:], dtype=np.int64))
        count = (end - begin) * item // np.dtype(dtype).itemsize
        data = np.fromfile(self.path, dtype, count, offset=self.begin + offset + begin * item)
        return data.reshape(end - begin, *shape[1:])

    def documents(self) -> "Documents":
        """Return what is known of the documents."""
        return Documents(self.read("documents"))

    def token_spans(self, lengths: "NDArray[np.int64]") -> Iterator[tuple[int, int, "NDArray[Any]"]]:
        """Yield (first document, end document, their tokens) in parts of about a million tokens.

        A document longer than that comes alone.
        """
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        first = 0
        while first < len(lengths):
            end = int(np.searchsorted(offsets, offsets[first] + _SPAN_TOKENS, side="right")) - 1
            end = min(max(end, first + 1), len(lengths))
            yield first, end, self.read("tokens", int(offsets[first]), int(offsets[end]))
            first = end


_NUMPY = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I64": "<i8"}


class ShardWriter:
    """Collects the documents of one file.

    Attributes:
        blank: documents left out because there is no text in them.
        masked: documents left out because no token of theirs is trained on.
        bad: records left out: (place, reason).
        problem: why the whole file is left out, or "".
        is_binary: whether that is because it is no text.
        end_tokens: ids that end what is trained on of a conversation.
        inner_tokens: those of them that stand inside of it too.
        added_ends: conversations behind which an end of text was put because nothing else ended them.
        literals: conversations with control tokens that are text.
    """

    _MOST_TOLD = 20
    _REASON_BYTES = 2400  # of the header; the first reason always fits
    _MOST_REASON_LENGTH = 500

    def __init__(self, stream: ArrayStream, columns: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._stream = stream
        self._dtypes = {name: dtype for name, (dtype, _) in columns.items()}
        self._hashes = {name: xxhash.xxh3_128() for name in columns}
        self.blank = 0
        self.masked = 0
        self.bad: list[tuple[int, str]] = []
        self.num_bad = 0
        self.problem = ""
        self.is_binary = False
        self.end_tokens: list[int] = []
        self.inner_tokens: list[int] = []
        self.added_ends = self.literals = 0

    def append(self, **columns: "NDArray[Any]") -> None:
        """Add entries to columns."""
        for name, array in columns.items():
            if len(array):
                stored = np.ascontiguousarray(array, self._dtypes[name])
                self._hashes[name].update(stored.data.cast("B"))
                self._stream.append(name, stored)

    def refuse(self, place: int, reason: str) -> None:
        """Note a record that is left out."""
        self.num_bad += 1
        reason = reason[: self._MOST_REASON_LENGTH]
        size = sum(len(known.encode()) for _, known in self.bad) + len(reason.encode())
        if len(self.bad) < self._MOST_TOLD and size <= self._REASON_BYTES:
            self.bad.append((place, reason))

    def finish(self) -> None:
        """Write down what is known beside the columns."""
        told = {
            "format": FORMAT,
            "blank": self.blank,
            "masked": self.masked,
            "bad": self.bad,
            "num_bad": self.num_bad,
            "problem": self.problem[: self._MOST_REASON_LENGTH],
            "is_binary": self.is_binary,
            "end_tokens": self.end_tokens,
            "inner_tokens": self.inner_tokens,
            "added_ends": self.added_ends,
            "literals": self.literals,
            "digests": {name: hash_.hexdigest() for name, hash_ in self._hashes.items()},
        }
        self._stream.metadata["shard"] = json.dumps(told, ensure_ascii=False)


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
            shard, digests = _open(path)
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
        return self._opened.get(key) or _open(self._path(key))[0]

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


class _Stored(msgspec.Struct):
    """What a shard's header says of it, see `Shard`; `digests` are those of its columns."""

    format: int
    blank: int
    masked: int
    bad: list[tuple[int, str]]
    num_bad: int
    problem: str
    is_binary: bool
    end_tokens: list[int]
    inner_tokens: list[int]
    added_ends: int
    literals: int
    digests: dict[str, str]


def _read_notes(path: Path) -> dict[str, Any]:
    """Return what is remembered of shards; it is only a shortcut, so a damaged file is as good as none."""
    try:
        known = msgspec.convert(state_files.parse_json(state_files.read_bytes(path)), _Notes)
    except (OSError, ValueError) as error:
        known = _Notes()
        if not isinstance(error, FileNotFoundError):
            state_files.say_ignored(path, error, "Shards are read again.")
    return msgspec.structs.asdict(known)


def _open(path: Path) -> tuple[Shard, dict[str, str]]:
    header, begin = read_safetensors_header(path)
    metadata: Any = header.pop("__metadata__")
    columns: Any = header
    said = state_files.parse_json(metadata["shard"].encode())
    if said["format"] != FORMAT:
        raise ValueError("it was written by other code")
    stored = msgspec.convert(said, _Stored)
    shard = Shard(
        path,
        begin,
        {name: (_NUMPY[c["dtype"]], tuple(c["shape"]), c["data_offsets"][0]) for name, c in columns.items()},
        stored.blank,
        stored.masked,
        stored.bad,
        stored.num_bad,
        stored.problem,
        stored.is_binary,
        stored.end_tokens,
        stored.inner_tokens,
        stored.added_ends,
        stored.literals,
    )
    return shard, stored.digests
