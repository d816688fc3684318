"""The token file: packed rows of tokens, written by the pretokenize stage and memory-mapped by its readers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from mlxflow.data.row_widths import lengths_of
from mlxflow.messages.advice import advise_build
from mlxflow.messages.errors import ArtifactError, SourceError
from mlxflow.storage import tensor_reading

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Batch(NamedTuple):
    """Rows of tokens in main memory.

    Attributes:
        tokens: (B, L + 1) ids.
        marks: (B, L + 1) for each token 2 * (number of its piece in the row, from 1) + (1 if it is trained on); 0 for
            unused positions. The tokens of a piece belong to one document.
        extras: further arrays of the rows, (B, L, ...) each, that the loss takes.
    """

    tokens: "NDArray[Any]"
    marks: "NDArray[Any]"
    extras: "tuple[NDArray[Any], ...]" = ()

    @property
    def targets(self) -> int:
        """Number of tokens that are trained on."""
        return int(np.count_nonzero(self.marks[:, 1:] & 1))

    @property
    def lengths(self) -> "NDArray[np.int64]":
        """(B,) of each row the positions that are needed; see `row_widths.lengths_of`."""
        return lengths_of(self.marks)


class Rows(NamedTuple):
    """Rows of tokens, memory-mapped or not; see `Batch`."""

    tokens: "NDArray[Any]"
    marks: "NDArray[Any]"
    extras: "tuple[NDArray[Any], ...]" = ()

    @property
    def num_rows(self) -> int:
        """The number of rows, R."""
        return len(self.tokens)

    def head(self, count: int) -> "Rows":
        """Return the first rows, as a view."""
        tokens, marks, *extras = (part[:count] for part in (self.tokens, self.marks, *self.extras))
        return Rows(tokens, marks, tuple(extras))

    def take(self, indices: "NDArray[np.int64]") -> Batch:
        """Return the rows of the given numbers, (B,), as a copy."""
        tokens, marks, *extras = (part.take(indices, axis=0) for part in (self.tokens, self.marks, *self.extras))
        return Batch(tokens, marks, tuple(extras))

    def batch(self, begin: int, end: int) -> "tuple[NDArray[Any], NDArray[Any]]":
        """Return tokens and marks of consecutive rows."""
        return self.tokens[begin:end], self.marks[begin:end]


class PieceAt(NamedTuple):
    """A part of a document in a row.

    Attributes:
        document: its number.
        document_begin: the piece's first token within the document.
        begin: the piece's first token within the row.
        end: one past its last.
    """

    document: int
    document_begin: int
    begin: int
    end: int


class TokenFile(NamedTuple):
    """The rows of one split of a corpus.

    Attributes:
        path: the file.
        rows: (R, L + 1) memory-mapped, ids in the smallest unsigned type.
        context_length: positions that the model sees, L.
        vocab_size: number of ids.
        end_of_text: the id that ends a document.
        has_conversations: whether any document is a conversation.
        targets: number of tokens that are trained on.
        end_tokens: ids of tokens that end documents or assistant turns.
    """

    path: Path
    rows: Rows
    context_length: int
    vocab_size: int
    end_of_text: int
    has_conversations: bool
    targets: int
    end_tokens: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a token file.

        Raises:
            ArtifactError: it is missing, damaged or no token file.
        """
        metadata = tensor_reading.read_metadata(path)
        try:
            numbers = [int(metadata[key]) for key in ("context_length", "vocab_size", "end_of_text", "targets")]
            has_conversations = metadata["has_conversations"] == "true"
            ends = tuple(int(number) for number in metadata["end_tokens"].split())
        except KeyError as error:
            raise ArtifactError(
                f"{path}: no token file (its metadata lacks {error}). {advise_build('pretokenize')}"
            ) from error
        except ValueError as error:
            raise ArtifactError(
                f"{path}: damaged (a number in its metadata is not valid). {advise_build('pretokenize')}"
            ) from error
        rows = Rows(tensor_reading.map_tensor(path, "tokens"), tensor_reading.map_tensor(path, "marks"))
        if rows.tokens.ndim != 2 or rows.marks.shape != rows.tokens.shape:
            raise ArtifactError(
                f"{path}: damaged (its tokens and marks differ in shape). {advise_build('pretokenize')}"
            )
        if min(numbers) < 0 or not all(0 <= one < numbers[1] for one in (numbers[2], *ends)):
            raise ArtifactError(f"{path}: damaged (its metadata names invalid ids). {advise_build('pretokenize')}")
        return cls(path, rows, numbers[0], numbers[1], numbers[2], has_conversations, numbers[3], ends)

    def full_rows(self, batch_size: int, key: str, *, sources: str = "the sources") -> Rows:
        """Return the rows if there is at least one batch of them.

        Args:
            batch_size: rows per batch.
            key: the setting of the batch size, for the message.
            sources: the setting of the sources, for the message.

        Raises:
            SourceError: there are fewer rows.
        """
        if self.rows.num_rows < batch_size:
            raise SourceError(
                f"{key} = {batch_size}: the training text fills {self.rows.num_rows} rows of {self.context_length} "
                f"tokens. Lower {key} or add text to {sources}."
            )
        return self.rows

    @property
    def packs_documents(self) -> bool:
        """Whether any row contains parts of several documents."""
        return bool((tensor_reading.map_tensor(self.path, "row_pieces") > 1).any())

    def pieces(self, row: int) -> "list[PieceAt]":
        """Return the document pieces of one row, in order."""
        counts = tensor_reading.map_tensor(self.path, "row_pieces")
        first = int(counts[:row].sum(dtype=np.int64))
        documents = tensor_reading.map_tensor(self.path, "piece_documents")[first : first + int(counts[row])]
        begins = tensor_reading.map_tensor(self.path, "piece_begins")[first : first + int(counts[row])]
        numbers = np.asarray(self.rows.marks[row] >> 1)
        starts = np.flatnonzero(np.diff(numbers.astype(np.int64), prepend=0))
        starts = starts[numbers[starts] > 0]
        lengths = np.bincount(numbers)[numbers[starts]]
        return [
            PieceAt(int(document), int(begin), int(start), int(start + length))
            for document, begin, start, length in zip(documents, begins, starts, lengths, strict=True)
        ]

    def place(self, document: int) -> tuple[int, int]:
        """Return the number of a document's file in `files.txt` and its line; 0 if it is the whole file."""
        files, places = (tensor_reading.map_tensor(self.path, name) for name in ("document_files", "document_places"))
        return int(files[document]), int(places[document])

    def name_rows(self, rows: "NDArray[np.int64]") -> str:
        """Return the documents in some rows as text for messages, as far as they can be read."""
        names = self.path.with_name("files.txt").read_text(encoding="utf-8").splitlines()
        documents = dict.fromkeys(piece.document for row in rows.tolist() for piece in self.pieces(row))
        places = [(names[file], place) for file, place in map(self.place, documents)]
        shown = ", ".join(f"{name}:{place}" if place else name for name, place in places)
        return f"rows {rows.tolist()} (documents {shown})"

    def documents(self) -> "list[NDArray[Any]]":
        """Return the tokens of every document, in order; for small files."""
        parts: dict[int, list[tuple[int, NDArray[Any]]]] = {}
        for row in range(self.rows.num_rows):
            for piece in self.pieces(row):
                tokens = np.array(self.rows.tokens[row, piece.begin : piece.end])
                parts.setdefault(piece.document, []).append((piece.document_begin, tokens))
        return [
            np.concatenate([tokens for _, tokens in sorted(parts[document], key=lambda one: one[0])])
            for document in sorted(parts)
        ]

    def require_vocabulary(self, vocab_size: int, key: str) -> None:
        """Check that a model's vocabulary contains every id.

        Args:
            vocab_size: of the model.
            key: the setting that names the model, for the message.

        Raises:
            ArtifactError: it does not.
        """
        if self.vocab_size > vocab_size:
            raise ArtifactError(
                f"{key}: the tokens of {self.path.parent} have ids up to {self.vocab_size - 1:,}, the model knows "
                f"{vocab_size:,}. Name the pretokenize stage that the model was trained on."
            )
