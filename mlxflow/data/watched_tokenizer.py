"""An untrusted tokenizer, opened and used in the child process of `mlxflow.data.guarded_tokenizer`.

Results are bounded in proportion to the input, since the calling process has to hold them, too. Imports must be
light, because every such process makes them at its start.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxflow.data.watched import Work
from mlxflow.messages.errors import ArtifactError, SourceError, reason_of
from mlxflow.storage.digests import digest_json

if TYPE_CHECKING:
    from tokenizers.decoders import DecodeStream

_MOST_IDS, _IDS_PER_BYTE = 1 << 20, 16
_MOST_CHARACTERS, _CHARACTERS_PER_ID = 1 << 20, 1024

# The text that is being decoded, one at a time
_stream: "DecodeStream | None" = None


class Opened:
    """A tokenizer that encodes whole texts.

    Args:
        folder: of a model or of a tokenizer.
        subject: its file, for the beginning of error messages.
        trusts_code: whether Python code of the folder may be run.

    Raises:
        ArtifactError: it is missing or cannot be opened.
    """

    def __init__(self, folder: Path, subject: str, *, trusts_code: bool) -> None:
        self.subject = subject
        file = folder / "tokenizer.json"
        files = [file] if file.is_file() else _vocabulary_files(folder)
        with Work(subject, size=sum(one.stat().st_size for one in files)):
            self.tokenizer = _read(file) if file.is_file() else _converted(folder, trusts_code)
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()


def _read(file: Path) -> Any:
    from tokenizers import Tokenizer

    definition = file.read_bytes()
    try:
        return Tokenizer.from_buffer(definition)
    except Exception as error:  # tokenizers raises this class itself
        reason = reason_of(error, None)
        raise ArtifactError(f"{file.parent}: its tokenizer cannot be opened ({reason}). Build it again.") from error


def _vocabulary_files(folder: Path) -> list[Path]:
    """Return the files that a tokenizer without a tokenizer.json is converted from; empty if they cannot be read."""
    from mlxflow.storage import model_files

    try:
        return [folder / name for name in model_files.tokenizer_files(folder)]
    except OSError:
        return []


def _converted(folder: Path, trusts_code: bool) -> Any:
    from mlxflow.models import tokenizer_files
    from mlxflow.storage import remote_code

    with remote_code.trusting_code(trusts_code):
        return tokenizer_files.convert_tokenizer(folder)


_opened = cache(Opened)


def open_(folder: Path, subject: str, trusts_code: bool) -> str:
    """Open a tokenizer; return why its ids would differ between two runs, empty if they do not."""
    return randomness(_opened(folder, subject, trusts_code=trusts_code).tokenizer)


def encode(key: tuple[Path, str, bool], text: str, special: bool) -> list[int]:
    """Return the ids of a text.

    Args:
        key: arguments of `open_`.
        text: any text.
        special: add the special tokens around the text.

    Raises:
        SourceError: the tokenizer fails, or makes too many tokens.
    """
    opened, size = _get(key), len(text.encode(errors="replace"))
    with Work(opened.subject, size=size):
        encoding = opened.tokenizer.encode(text, add_special_tokens=special)
        if len(encoding) > _MOST_IDS + _IDS_PER_BYTE * size:
            raise SourceError(
                f"{opened.subject} makes {len(encoding):,} tokens of a text of {size:,} bytes. Fix it or name another."
            )
        ids: list[int] = encoding.ids
    return ids


def decode(key: tuple[Path, str, bool], ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Return the text of some ids.

    Raises:
        SourceError: the tokenizer fails, or makes too long a text.
    """
    opened = _get(key)
    with Work(opened.subject, size=4 * len(ids)):
        text: str = opened.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    return _bounded(opened, text, len(ids))


def begin_stream() -> None:
    """Begin decoding a text token by token, without control tokens."""
    global _stream
    from tokenizers.decoders import DecodeStream

    _stream = DecodeStream(skip_special_tokens=True)


def step_stream(key: tuple[Path, str, bool], token: int) -> str:
    """Return the text that a token adds; empty while a character is incomplete.

    Raises:
        SourceError: as `decode`.
    """
    if _stream is None:
        begin_stream()
    opened = _get(key)
    with Work(opened.subject, size=4):
        text = _stream.step(opened.tokenizer, token)  # type: ignore[union-attr]  # it was begun
    return _bounded(opened, text or "", 1)


def token_to_id(key: tuple[Path, str, bool], text: str) -> int | None:
    """Return the id of a token; None if there is no such token."""
    number: int | None = _get(key).tokenizer.token_to_id(text)
    return number


def digest_vocabulary(key: tuple[Path, str, bool]) -> str:
    """Return a digest of all tokens with their ids, equal for tokenizers with equal vocabularies."""
    opened = _get(key)
    with Work(opened.subject, size=40 * opened.tokenizer.get_vocab_size()):  # bytes of a file
        return digest_json(opened.tokenizer.get_vocab())


def randomness(tokenizer: Any) -> str:
    """Return why the ids of a tokenizer would differ between two runs, with advice; empty if they do not."""
    dropout = getattr(tokenizer.model, "dropout", None)
    if not dropout:
        return ""
    return f"model.dropout = {dropout:g}: two runs would give different ids. Set it to null."


def _get(key: tuple[Path, str, bool]) -> Opened:
    folder, subject, trusts_code = key
    return _opened(folder, subject, trusts_code=trusts_code)


def _bounded(opened: Opened, text: str, count: int) -> str:
    if len(text) > _MOST_CHARACTERS + _CHARACTERS_PER_ID * count:
        raise SourceError(
            f"{opened.subject} makes a text of {len(text):,} characters of {count:,} tokens. Fix it or name another."
        )
    return text
