"""A tokenizer of others that a watched process opens and uses; see `mlxflow.data.guard`. For a few texts at a time."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxflow.data import watched_tokenizer
from mlxflow.data.guard import Guard
from mlxflow.storage import remote_code


class GuardedTokenizer:
    """The tokenizer of a folder, in a process of its own that lives as long as this object.

    The process starts at once and beside the caller's work; nothing is opened before the first call.

    Args:
        folder: of a model, or of a tokenizer alone.
        subject: its file, as a message begins; by default the folder's tokenizer.json.
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
        """Open the tokenizer; return what makes its ids differ between two runs, empty for nothing.

        Raises:
            ArtifactError: there is none that can be opened.
            SourceError: it takes too much time or memory.
        """
        return str(self._ask("open_", *self._key))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text, with what the tokenizer puts around one or without.

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
        """Yield what each token adds to a text, control tokens left out; one such text at a time.

        Raises:
            SourceError: as `decode`.
        """
        self._ask("begin_stream")
        for token in tokens:
            if text := self._ask("step_stream", self._key, token):
                yield text

    def token_to_id(self, text: str) -> int | None:
        """Return the id of a token; None where there is no such token."""
        number: int | None = self._ask("token_to_id", self._key, text)
        return number

    def digest_vocabulary(self) -> str:
        """Return a digest of all tokens with their ids: equal for tokenizers of one vocabulary."""
        return str(self._ask("digest_vocabulary", self._key))

    def _ask(self, function: str, *values: Any) -> Any:
        return self.call(f"{watched_tokenizer.__name__}:{function}", *values)
