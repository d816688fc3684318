"""A file of tokens, written by the pretokenize stage and mapped into memory by its readers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from mlxflow import artifact
from mlxflow.data.batches import rows
from mlxflow.errors import ArtifactError, SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TokenFile(NamedTuple):
    """The tokens of one side of a corpus.

    Attributes:
        tokens: (T,) memory-mapped ids in the smallest unsigned type.
        document_offsets: (D + 1,) document d is tokens[document_offsets[d]:document_offsets[d + 1]].
        context_length: positions the model is to see, L.
        vocab_size: ids there are.
        end_of_text: the id that ends every document.
    """

    tokens: "NDArray[Any]"
    document_offsets: "NDArray[np.int64]"
    context_length: int
    vocab_size: int
    end_of_text: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a token file.

        Raises:
            ArtifactError: it is missing, damaged or no token file.
        """
        metadata = artifact.read_metadata(path)
        try:
            context_length, vocab_size, end_of_text = (
                int(metadata[key]) for key in ("context_length", "vocab_size", "end_of_text")
            )
        except (KeyError, ValueError) as error:
            raise ArtifactError(f"{path}: no token file (its metadata lacks {error}). Run: doit pretokenize") from error
        return cls(
            artifact.map_tensor(path, "tokens"),
            artifact.map_tensor(path, "document_offsets"),
            context_length,
            vocab_size,
            end_of_text,
        )

    def rows(self) -> "NDArray[Any]":
        """Return the tokens as rows of inputs and targets, (R, L + 1), without a copy."""
        return rows(self.tokens, context_length=self.context_length)

    def full_rows(self, batch_size: int, key: str) -> "NDArray[Any]":
        """Return the rows, at least one batch of them.

        Args:
            batch_size: rows that one batch holds.
            key: the setting that asks for them, for the message.

        Raises:
            SourceError: there are fewer rows.
        """
        table = self.rows()
        if len(table) < batch_size:
            raise SourceError(
                f"{key} = {batch_size}: the training text fills {len(table)} rows of {self.context_length} tokens. "
                f"Lower {key} or add text to pretokenize.sources."
            )
        return table
