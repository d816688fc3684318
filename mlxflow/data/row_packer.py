"""Pack a stream of documents into rows and write them, one window of documents at a time."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import msgspec
import numpy as np

from mlxflow.data.bin_packing import Packing, best_fit, continuous, cut, cut_continuously
from mlxflow.data.corpus_figures import SideCounts
from mlxflow.data.row_marks import has_targets, marks_of_parts
from mlxflow.storage.array_stream import ArrayStream

if TYPE_CHECKING:
    from numpy.typing import NDArray

OnLong = Literal["split", "truncate", "drop"]


class Stored(NamedTuple):
    """One document to be packed.

    Attributes:
        number: within the documents of this split.
        tokens: (n,)
        is_conversation: it is not split unless it is longer than a row.
        targets: (n,) whether each token is trained on, or None for all of them.
    """

    number: int
    tokens: "NDArray[Any]"
    is_conversation: bool
    targets: "NDArray[np.bool_] | None"


# Documents that are packed together: enough to fill almost all rows.
_WINDOW_TOKENS = 1 << 21
_WINDOW_ROWS = 2048
_LARGEST_WINDOW_TOKENS = 1 << 25

# A row with more room than this waits for the next window; at most a quarter of a window waits.
_MOST_ROOM = 0.005
_MOST_KEPT = 0.25


class RowSettings(NamedTuple):
    """The settings of packing documents into rows.

    Attributes:
        capacity: tokens that a row holds.
        packing: the packing method.
        on_long: what to do with conversations longer than a row.
        padding: the id for unused positions of a row.
        seed: of the packing order within a window.
    """

    capacity: int
    packing: Packing
    on_long: OnLong
    padding: int
    seed: int


class _Part(NamedTuple):
    """The part of a document in one row, or in several rows that it fills alone.

    Attributes:
        document: its number; -1 for unused positions.
        begin: the first token within the document.
        tokens: (n,)
        targets: (n,) whether each is trained on, or None for all of them.
    """

    document: int
    begin: int
    tokens: "NDArray[Any]"
    targets: "NDArray[np.bool_] | None"

    @classmethod
    def of(cls, document: Stored, begin: int, end: int) -> "_Part":
        targets = None if document.targets is None else document.targets[begin:end]
        return cls(document.number, begin, document.tokens[begin:end], targets)


class Packer:
    """Collects documents until a window is full, then packs them into rows; used in a `with` block.

    Args:
        stream: receives the rows; see `token_file.TokenFile` for its columns.
        settings: of the packing.
    """

    def __init__(self, stream: ArrayStream, settings: RowSettings) -> None:
        self._stream = stream
        self._capacity, self._packing, self._on_long, self._padding, self._seed = settings
        self._window_tokens = min(max(_WINDOW_TOKENS, _WINDOW_ROWS * self._capacity), _LARGEST_WINDOW_TOKENS)
        self._window = 0
        self._full: list[_Part] = []  # of full rows
        self._waiting: list[_Part] = []
        self._num_waiting = 0
        self._highest = -1
        self._counts = SideCounts(**dict.fromkeys(SideCounts.__struct_fields__, 0))
        self._writing: Future[dict[str, int]] | None = None

    def add(self, document: Stored) -> None:
        """Add a document; a full window is written."""
        length = len(document.tokens)
        is_new = document.number > self._highest
        self._highest = max(self._highest, document.number)
        self._count(documents=is_new, conversations=is_new and document.is_conversation)
        if length > self._capacity and document.is_conversation and self._on_long != "split":
            if self._on_long == "drop":
                self._count(dropped=is_new)
                return
            self._count(truncated=is_new)
            length = self._capacity
        if self._packing == "concat":
            self._add_continuously(document, length, is_new=is_new)
        else:
            self._count(cut_documents=is_new and length > self._capacity)
            self._add_cut(document, length)

    def finish(self) -> SideCounts:
        """Write the remaining documents and return the figures."""
        self._write(last=True)
        self._wait_for_writer()
        return self._counts

    def __enter__(self) -> Self:
        self._writer = ThreadPoolExecutor(1, "write rows")
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown()

    def _count(self, **more: int) -> None:
        raised = {name: getattr(self._counts, name) + number for name, number in more.items()}
        self._counts = msgspec.structs.replace(self._counts, **raised)

    def _add_cut(self, document: Stored, length: int) -> None:
        """Add a document as rows that it fills alone and a remainder."""
        whole = length - length % self._capacity
        step = max(1, self._window_tokens // self._capacity) * self._capacity
        for begin in range(0, whole, step):
            self._take(self._full, _Part.of(document, begin, min(begin + step, whole)))
        if whole < length:
            self._take(self._waiting, _Part.of(document, whole, length))

    def _add_continuously(self, document: Stored, length: int, *, is_new: bool) -> None:
        """Add a document as pieces that continue after the last one; a conversation begins a new row."""
        filled = self._num_waiting % self._capacity
        if document.is_conversation:
            pieces = cut(document.number, length, self._capacity)
            if filled + length > self._capacity and filled:
                empty = np.full(self._capacity - filled, self._padding, document.tokens.dtype)
                self._take(self._waiting, _Part(-1, 0, empty, None))
        else:
            pieces = cut_continuously(document.number, length, self._capacity, filled)
        is_cut = is_new and len(pieces) > 1
        self._count(cut_documents=is_cut, needlessly_cut=is_cut and length <= self._capacity)
        for piece in pieces:
            self._take(self._waiting, _Part.of(document, piece.begin, piece.end))

    def _take(self, parts: list[_Part], part: _Part) -> None:
        parts.append(part)
        self._num_waiting += len(part.tokens)
        if self._num_waiting >= self._window_tokens:
            self._write(last=False)

    def _write(self, *, last: bool) -> None:
        """Write a window except for rows that the next one may fill."""
        if self._full:
            self._lay_full()
        if self._waiting:
            rows = self._assign()
            is_kept = np.zeros(len(rows), np.bool_) if last else self._keep(rows)
            self._lay([self._waiting[i] for i in np.flatnonzero(~is_kept).tolist()], rows[~is_kept])
            # copies, so that the memory of their neighbours is freed
            self._waiting = [
                part._replace(tokens=part.tokens.copy()) for part in (self._waiting[i] for i in np.flatnonzero(is_kept))
            ]
        self._num_waiting = sum(len(part.tokens) for part in self._waiting)
        self._window += 1

    def _assign(self) -> "NDArray[np.int64]":
        """Return the row of each waiting part."""
        lengths = [len(part.tokens) for part in self._waiting]
        if self._packing == "concat":
            return np.array(continuous(lengths, self._capacity, 0), np.int64)
        if self._packing == "none":
            return np.arange(len(lengths))
        order = np.random.default_rng([self._seed, self._window]).permutation(len(lengths))
        self._waiting = [self._waiting[i] for i in order.tolist()]
        return np.array(best_fit([lengths[i] for i in order.tolist()], self._capacity)[0], np.int64)

    def _keep(self, rows: "NDArray[np.int64]") -> "NDArray[np.bool_]":
        """Return which parts wait for the next window: those in rows with room."""
        lengths = np.array([len(part.tokens) for part in self._waiting])
        room = self._capacity - np.bincount(rows, weights=lengths).astype(np.int64)
        if self._packing == "concat":
            kept_rows = room > 0
        elif self._packing == "none":
            kept_rows = np.zeros(len(room), np.bool_)
        else:
            kept_rows = room > _MOST_ROOM * self._capacity
            if kept_rows.sum() > max(1, _MOST_KEPT * len(room)):  # the emptiest rows
                kept_rows = room > np.sort(room)[int((1 - _MOST_KEPT) * len(room))]
        is_kept: NDArray[np.bool_] = kept_rows[rows]
        return is_kept

    # --- rows

    def _lay(self, parts: list[_Part], rows: "NDArray[np.int64]") -> None:
        """Write parts as rows; row numbers without a part are skipped."""
        if not parts:
            return
        _, rows = np.unique(rows, return_inverse=True)
        order = np.argsort(rows, kind="stable")
        rows, laid = rows[order], [parts[i] for i in order.tolist()]
        count = int(rows[-1]) + 1
        lengths = np.array([len(part.tokens) for part in laid], np.int64)
        real = np.array([part.document >= 0 for part in laid])
        row_pieces = np.bincount(rows, minlength=count)
        lasts = np.cumsum(row_pieces) - 1
        room = np.zeros(len(laid), np.int64)  # unused positions after each part: only after the last one of a row
        room[lasts] = self._capacity - np.bincount(rows, weights=lengths).astype(np.int64)
        in_row = np.arange(len(laid)) - (lasts - row_pieces + 1)[rows]
        padding = np.full(self._capacity, self._padding, laid[0].tokens.dtype)
        tokens: list[NDArray[Any]] = []
        for part, empty in zip(laid, room.tolist(), strict=True):
            tokens.append(part.tokens)
            if empty:
                tokens.append(padding[:empty])
        self._append(
            np.concatenate(tokens),
            marks_of_parts([part.targets for part in laid], np.where(real, 2 * in_row + 3, 0), lengths, room),
            np.array([part.document for part in laid])[real],
            np.array([part.begin for part in laid])[real],
            np.bincount(rows[real], minlength=count),
        )

    def _lay_full(self) -> None:
        """Write the rows that one document fills alone."""
        capacity = self._capacity
        counts = [len(part.tokens) // capacity for part in self._full]
        marks = np.full((sum(counts), capacity), 3, np.uint8)
        marks[:, 0] = 2  # the first token of a piece is never trained on: it has no context
        at = 0
        for part, count in zip(self._full, counts, strict=True):
            if part.targets is not None:
                marks[at : at + count] &= 2 + part.targets.reshape(-1, capacity).astype(np.uint8)
            at += count
        self._append(
            np.concatenate([part.tokens for part in self._full]),
            marks,
            np.repeat([part.document for part in self._full], counts),
            np.concatenate([part.begin + np.arange(n) * capacity for part, n in zip(self._full, counts, strict=True)]),
            np.ones(sum(counts), np.uint8),
        )
        self._full = []

    def _append(
        self,
        tokens: "NDArray[Any]",
        marks: "NDArray[Any]",
        documents: "NDArray[np.int64]",
        begins: "NDArray[np.int64]",
        row_pieces: "NDArray[Any]",
    ) -> None:
        """Write rows and their piece table in another thread."""
        self._wait_for_writer()
        self._writing = self._writer.submit(self._append_now, tokens, marks, documents, begins, row_pieces)

    def _append_now(self, tokens: Any, marks: Any, documents: Any, begins: Any, row_pieces: Any) -> dict[str, int]:
        """Write the rows with trained tokens, and return what to add to the figures."""
        tokens, marks = tokens.reshape(-1, self._capacity), marks.reshape(-1, self._capacity)
        is_trained = has_targets(marks)
        if not is_trained.all():
            kept_pieces = np.repeat(is_trained, row_pieces)
            tokens, marks, row_pieces = tokens[is_trained], marks[is_trained], row_pieces[is_trained]
            documents, begins = documents[kept_pieces], begins[kept_pieces]
        if len(row_pieces):
            self._stream.append("tokens", tokens)
            self._stream.append("marks", marks)
            self._stream.append("piece_documents", documents.astype(np.uint64))
            self._stream.append("piece_begins", begins.astype(np.uint64))
            self._stream.append("row_pieces", row_pieces.astype(np.uint64))
        return {
            "tokens": int(np.count_nonzero(marks)),
            "targets": int(np.count_nonzero(marks & 1)),
            "rows": len(row_pieces),
            "slots": tokens.size,
            "rows_without_targets": int(np.count_nonzero(~is_trained)),
        }

    def _wait_for_writer(self) -> None:
        if self._writing is not None:
            self._count(**self._writing.result())
        self._writing = None
