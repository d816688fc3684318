"""A shard: the tokens of one source file and the table of its documents, as safetensors; its reader and its writer."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from mlxflow.storage import state_files
from mlxflow.storage.array_stream import ArrayStream
from mlxflow.storage.tensor_header import read_safetensors_header
from mlxflow.storage.tensor_types import NUMPY_TYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Increased when shards of earlier code become invalid.
FORMAT = 3

#: Flags of a document: it is a conversation; only its spans are trained on.
CONVERSATION, MASKED = 1, 2


_SPAN_TOKENS = 1 << 20


class Documents(NamedTuple):
    """The table of a shard's documents.

    Attributes:
        table: (D, 7) for each its length in tokens, the two halves of the xxh3-128 of its content, its size in UTF-8
            bytes, its position (a line or number), its flags and its number of spans.
    """

    table: "NDArray[np.uint64]"

    @property
    def lengths(self) -> "NDArray[np.int64]":
        """Length of each document in tokens, (D,)."""
        return self.table[:, 0].astype(np.int64)

    @property
    def hashes(self) -> "NDArray[np.uint64]":
        """The two halves of each content digest, (D, 2)."""
        return self.table[:, 1:3]

    @property
    def sizes(self) -> "NDArray[np.uint64]":
        """Size of each text in UTF-8 bytes, (D,)."""
        return self.table[:, 3]

    @property
    def places(self) -> "NDArray[np.uint64]":
        """The line or the number of each document in its file, (D,)."""
        return self.table[:, 4]

    @property
    def flags(self) -> "NDArray[np.uint64]":
        """CONVERSATION, MASKED, both or none, (D,)."""
        return self.table[:, 5]

    @property
    def span_counts(self) -> "NDArray[np.int64]":
        """Number of trained spans of each document, (D,)."""
        return self.table[:, 6].astype(np.int64)


class ShardSummary(msgspec.Struct, kw_only=True):
    """Figures in the header of a shard.

    Attributes:
        blank: documents left out because they have no text.
        masked: documents left out because none of their tokens is trained on.
        bad: the first of the records left out: (position, reason).
        num_bad: number of records left out.
        problem: why the whole file is left out; empty if it is not.
        is_binary: whether it is left out because it is binary.
        end_tokens: ids of tokens that end the trained turns of a conversation.
        inner_tokens: those of them that also occur inside a turn.
        added_ends: conversations with an appended end-of-text token because no other token ended them.
        literals: conversations with control tokens inside messages.
    """

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


class Shard(ShardSummary, kw_only=True):
    """The tokens and the document table of one source file.

    Columns: `tokens` (T,), `documents` (D, 7), see `Documents`, and `spans` (S, 2), the trained tokens of the
    documents that are MASKED, relative to their document.

    Attributes:
        path: the file.
        begin: offset of its tensors in the file.
        columns: type, shape and offset of each column.
    """

    path: Path
    begin: int
    columns: dict[str, tuple[str, tuple[int, ...], int]]

    @property
    def num_documents(self) -> int:
        """D."""
        return self.columns["documents"][1][0]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.columns["tokens"][1][0]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> "NDArray[Any]":
        """Return entries of a column, read from the file, because a memory map would count as the process's memory."""
        dtype, shape, offset = self.columns[name]
        end = shape[0] if end is None else end
        item = np.dtype(dtype).itemsize * int(np.prod(shape[1:], dtype=np.int64))
        count = (end - begin) * item // np.dtype(dtype).itemsize
        data = np.fromfile(self.path, dtype, count, offset=self.begin + offset + begin * item)
        return data.reshape(end - begin, *shape[1:])

    def documents(self) -> "Documents":
        """Return the table of the documents."""
        return Documents(self.read("documents"))

    def token_spans(self, lengths: "NDArray[np.int64]") -> Iterator[tuple[int, int, "NDArray[Any]"]]:
        """Yield (first document, end document, tokens) in parts of about a million tokens, or one longer document."""
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        first = 0
        while first < len(lengths):
            end = int(np.searchsorted(offsets, offsets[first] + _SPAN_TOKENS, side="right")) - 1
            end = min(max(end, first + 1), len(lengths))
            yield first, end, self.read("tokens", int(offsets[first]), int(offsets[end]))
            first = end


class ShardWriter:
    """Collects the documents of one file.

    Attributes:
        summary: figures for the header, filled in by the caller.
    """

    _MAX_REASONS = 20
    _REASON_BYTES = 2400  # bytes of the header; the first reason always fits
    _MAX_REASON_LENGTH = 500

    def __init__(self, stream: ArrayStream, columns: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._stream = stream
        self._dtypes = {name: dtype for name, (dtype, _) in columns.items()}
        self._hashes = {name: xxhash.xxh3_128() for name in columns}
        self.summary = ShardSummary(
            blank=0,
            masked=0,
            bad=[],
            num_bad=0,
            problem="",
            is_binary=False,
            end_tokens=[],
            inner_tokens=[],
            added_ends=0,
            literals=0,
        )

    def append(self, **columns: "NDArray[Any]") -> None:
        """Add entries to columns."""
        for name, array in columns.items():
            if len(array):
                stored = np.ascontiguousarray(array, self._dtypes[name])
                self._hashes[name].update(stored.data.cast("B"))
                self._stream.append(name, stored)

    def refuse(self, place: int, reason: str) -> None:
        """Record that a record is left out."""
        summary = self.summary
        summary.num_bad += 1
        reason = reason[: self._MAX_REASON_LENGTH]
        size = sum(len(known.encode()) for _, known in summary.bad) + len(reason.encode())
        if len(summary.bad) < self._MAX_REASONS and size <= self._REASON_BYTES:
            summary.bad.append((place, reason))

    def finish(self) -> None:
        """Write the summary and the digests of the columns into the header."""
        self.summary.problem = self.summary.problem[: self._MAX_REASON_LENGTH]
        header = {
            "format": FORMAT,
            **msgspec.structs.asdict(self.summary),
            "digests": {name: hash_.hexdigest() for name, hash_ in self._hashes.items()},
        }
        self._stream.metadata["shard"] = json.dumps(header, ensure_ascii=False)


class _Header(ShardSummary, kw_only=True):
    """A shard's header; `digests` are those of its columns."""

    format: int
    digests: dict[str, str]


def open_shard(path: Path) -> tuple[Shard, dict[str, str]]:
    """Return a shard and the digests of its columns, by name, from its header.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no shard of this version.
    """
    tensors, begin = read_safetensors_header(path)
    metadata: Any = tensors.pop("__metadata__")
    stored = state_files.parse_json(metadata["shard"].encode())
    if stored["format"] != FORMAT:
        raise ValueError("it was written by other code")
    header = msgspec.convert(stored, _Header)
    shard = Shard(
        path=path,
        begin=begin,
        columns={
            name: (NUMPY_TYPES[column["dtype"]], tuple(column["shape"]), column["data_offsets"][0])
            for name, column in tensors.items()
        },
        **{field: getattr(header, field) for field in ShardSummary.__struct_fields__},
    )
    return shard, header.digests
