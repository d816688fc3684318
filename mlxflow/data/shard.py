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

#: Raised when shards that earlier code wrote are wrong now.
FORMAT = 3

#: Flags of a document: it is a conversation; only its spans are trained on.
CONVERSATION, MASKED = 1, 2


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


class ShardSummary(msgspec.Struct, kw_only=True):
    """What the header of a shard says beside its columns.

    Attributes:
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
    """The tokens of one source file and what is known of its documents.

    Columns: `tokens` (T,), `documents` (D, 7), see `Documents`, and `spans` (S, 2), the tokens trained on, relative to
    their document, of those documents that are MASKED.

    Attributes:
        path: the file.
        begin: where its tensors begin in the file.
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


class ShardWriter:
    """Collects the documents of one file.

    Attributes:
        summary: what the header will say beside the columns; whoever writes the shard fills it.
    """

    _MAX_REASONS = 20
    _REASON_BYTES = 2400  # of the header; the first reason always fits
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
        """Note a record that is left out."""
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
    """Return a shard and the digests of its columns, by name, as its header has them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no shard of this format.
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
