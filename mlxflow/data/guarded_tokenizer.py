"""An untrusted tokenizer in a guarded process, for a few texts at a time; see `mlxflow.data.guard`."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxflow.data import watched_tokenizer
from mlxflow.data.guard import Guard
from mlxflow.storage import remote_code


class GuardedTokenizer:
    """The tokenizer of a folder, in its own process that ends with this object.

    The process starts at once, in parallel to the caller; the tokenizer is opened by the first call.

    Args:
        folder: of a model or of a tokenizer.
        subject: name of its file for error messages; by default the folder's tokenizer.json.
    """

    def __init__(self, folder: Path, subject: str = "") -> None:
        self._key = (folder, subject or f"{folder}: its tokenizer.json", remote_code.trusts_code())
        guard = Guard().__enter__()
        self.call = guard.call
        self._close = weakref.finalize(self, guard.__exit__, None, None, None)

    def close(self) -> None:
        """End the process."""
        self._close()

    def open(self) -> str:
        """Open the tokenizer; return why its ids would differ between two runs, empty if they do not.

        Raises:
            ArtifactError: it is missing or cannot be opened.
            SourceError: it takes too much time or memory.
        """
        return str(self._ask("open_", *self._key))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text, with or without the special tokens that the tokenizer adds.

        Raises:
            SourceError: the tokenizer fails, makes too many tokens, or takes too much time or memory.
        """
        ids: list[int] = self._ask("encode", self._key, text, add_special_tokens)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of some ids.

        Raises:
            SourceError: the tokenizer fails, makes too long a text, or takes too much time or memory.
        """
        return str(self._ask("decode", self._key, ids, skip_special_tokens))

    def decode_each(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the text that each token adds, without control tokens; only one such text at a time.

        Raises:
            SourceError: as `decode`.
        """
        self._ask("begin_stream")
        for token in tokens:
            if text := self._ask("step_stream", self._key, token):
                yield text

    def token_to_id(self, text: str) -> int | None:
        """Return the id of a token; None if there is no such token."""
        number: int | None = self._ask("token_to_id", self._key, text)
        return number

    def digest_vocabulary(self) -> str:
        """Return a digest of all tokens with their ids, equal for tokenizers with equal vocabularies."""
        return str(self._ask("digest_vocabulary", self._key))

    def _ask(self, function: str, *values: Any) -> Any:
        return self.call(f"{watched_tokenizer.__name__}:{function}", *values)
