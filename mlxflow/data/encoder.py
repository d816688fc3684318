"""Encode texts with the fastest engine that gives the same ids as the `tokenizers` library.

fastokens is 30 to 60 times as fast. It is used only for tokenizers with equal ids on a set of probe strings:
difficult strings of every script, white space, control tokens, and the patterns that common pre-tokenizers split on.
It refuses unsupported tokenizers itself.
"""

import functools
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from mlxflow.data.watched import is_panic

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The library keeps an object of about 100 bytes per token until a call ends.
_BYTES_PER_CALL = 1 << 18

# fastokens caches words, up to hundreds of megabytes; a new tokenizer starts with an empty cache.
_TOKENS_PER_TOKENIZER = 1 << 23

_PIECES = (  # noqa: SIM905 - a list of a hundred lines would say no more
    "a b the ing 's 'S I'll don't \n \n\n \t \r\n \xa0 \u3000 \u200b 1 12 123 1234 12345 3.14 -7 0x1F é "
    "é ß İ ﬁ Ω ж שלום مرحبا नमस्ते ไทย 中文 日本語 カタカナ 한국어 🙂 \U0001f469\u200d\U0001f469\u200d\U0001f467 🇩🇪 "
    "\u202e \ufeff � _ __ ## !! ?! ... => != <= <| |> </s> <s> [INST] { } ( ) [ ] ; : , . / \\ \" ' ` ~ "
    "@ # $ % ^ & * + = | < > snake_case camelCase HTTPServer x1y2 \x00 \x7f 𐍈 ำ \uff46\uff55\uff4c\uff4c ½ ² ﷺ ẛ̣"
).split(" ")


class Encoder(Protocol):
    """Encodes texts to ids.

    Attributes:
        name: of the library used.
    """

    name: str

    def encode(self, texts: Sequence[str], *, special: bool) -> "tuple[NDArray[np.uint32], NDArray[np.int64]]":
        """Return the ids of texts, without the special tokens that a tokenizer adds around them.

        Args:
            texts: any number of texts.
            special: control tokens in the text become their ids; otherwise they are plain text.

        Returns:
            ids: (T,) of all texts, one after another.
            offsets: (D + 1,) text d is ids[offsets[d]:offsets[d + 1]].
        """
        ...


def choose_encoder(definition: str, *, threads: int) -> Encoder:
    """Return the fastest engine with correct ids for a `tokenizer.json`.

    Args:
        definition: content of the file.
        threads: of the `tokenizers` library; fastokens has its own.
    """
    right = LibraryEncoder(definition, threads=1)
    try:
        fast = FastEncoder(definition)
        strings = probe_strings(definition)
        for special in (False, True):
            (ids, offsets), fast_result = right.encode(strings, special=special), fast.encode(strings, special=special)
            if not (np.array_equal(ids, fast_result[0]) and np.array_equal(offsets, fast_result[1])):
                return LibraryEncoder(definition, threads=threads)
    except BaseException as error:
        if not isinstance(error, ImportError | ValueError | RuntimeError | OSError) and not is_panic(error):
            raise
        return LibraryEncoder(definition, threads=threads)
    return fast


def probe_strings(definition: str) -> list[str]:
    """Return a few thousand strings on which engines may differ, including the tokenizer's control tokens."""
    added = [str(token["content"]) for token in _added_tokens(definition)]
    generator = random.Random(0)
    pieces = [*_PIECES, *added[:20], *added[-20:]]
    mixed = ["".join(generator.choices(pieces, k=generator.randrange(1, 12))) for _ in range(900)]
    spaced = [" ".join(generator.choices(pieces, k=generator.randrange(1, 12))) for _ in range(500)]
    wide = ["".join(chr(generator.choice(_PLANES)) for _ in range(8)) for _ in range(500)]
    return ["", " ", "\n", *pieces, *mixed, *spaced, *wide]


_PLANES = [code for code in (*range(0x3000), *range(0x3000, 0x30000, 37)) if not 0xD800 <= code < 0xE000]


def _added_tokens(definition: str) -> list[dict[str, Any]]:
    import json

    return list(json.loads(definition).get("added_tokens") or [])


class FastEncoder:
    """The fastokens engine: it has its own threads and makes no object per token.

    Raises:
        ValueError: it does not support the tokenizer.
    """

    name = "fastokens"

    def __init__(self, definition: str) -> None:
        import fastokens

        self._definition = definition
        self._make = fastokens.Tokenizer.from_json_str
        self._tokenizer = self._make(definition)
        self._encoded = 0

    def encode(self, texts: Sequence[str], *, special: bool) -> "tuple[NDArray[np.uint32], NDArray[np.int64]]":
        """See `Encoder`."""
        try:
            ids, offsets = self._tokenizer.encode_batch_flat(
                list(texts), add_special_tokens=False, split_special_tokens=not special
            )
        except ValueError:  # a pattern exceeds the limits of this library, which differ from those of the other
            return self._library.encode(texts, special=special)
        self._encoded += len(ids) // 4
        if self._encoded > _TOKENS_PER_TOKENIZER:
            self._tokenizer, self._encoded = self._make(self._definition), 0
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)

    @functools.cached_property
    def _library(self) -> "LibraryEncoder":
        return LibraryEncoder(self._definition, threads=1)


class LibraryEncoder:
    """The `tokenizers` library, which supports every tokenizer.

    Its own threads contend for one cache; here each thread has its own tokenizer.
    """

    name = "tokenizers"

    def __init__(self, definition: str, *, threads: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        count = max(1, min(threads, os.cpu_count() or 1))
        self._free: SimpleQueue[Tokenizer] = SimpleQueue()
        for _ in range(count):
            self._free.put(Tokenizer.from_str(definition))
        self._pool = ThreadPoolExecutor(count, "tokenizers")

    def encode(self, texts: Sequence[str], *, special: bool) -> "tuple[NDArray[np.uint32], NDArray[np.int64]]":
        """See `Encoder`."""
        parts = self._pool.map(lambda call: self._encode(texts[call[0] : call[1]], special=special), _calls(texts))
        pieces = [piece for part in parts for piece in part]
        offsets = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
        return (np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)), offsets

    def _encode(self, texts: Sequence[str], *, special: bool) -> "list[NDArray[np.uint32]]":
        tokenizer = self._free.get()
        try:
            tokenizer.encode_special_tokens = not special
            encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]
        finally:
            self._free.put(tokenizer)


def _calls(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return (begin, end) of parts with about the number of characters for one call."""
    parts: list[tuple[int, int]] = []
    begin = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= _BYTES_PER_CALL:
            parts.append((begin, index + 1))
            begin, size = index + 1, 0
    return [*parts, (begin, len(texts))] if begin < len(texts) else parts


class TokenSpans:
    """Finds the tokens that contain given characters.

    For a byte-level tokenizer without a normalizer, the tokens' bytes are the text's bytes, so their lengths give the
    position of each token; if they do not add up, the `tokenizers` library is used.

    Args:
        definition: `tokenizer.json`.
    """

    def __init__(self, definition: str) -> None:
        import json

        self._definition = definition
        parsed = json.loads(definition)
        self._lengths = _token_lengths(self._tokenizer, parsed) if _is_byte_level(parsed) else None

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self._definition)

    def mask(self, text: str, ids: "NDArray[np.uint32]", spans: Sequence[tuple[int, int]]) -> "NDArray[np.bool_]":
        """Return (T,) whether each token contains a character of a span.

        Args:
            text: the tokenized text, control tokens included.
            ids: (T,) its tokens.
            spans: (begin, end) of characters, in order.
        """
        begins, ends, in_bytes = self._bounds(text, ids)
        if in_bytes:
            spans = [(len(text[:begin].encode()), len(text[:end].encode())) for begin, end in spans]
        return overlapping(begins, ends, spans)

    def _bounds(self, text: str, ids: "NDArray[np.uint32]") -> "tuple[NDArray[np.int64], NDArray[np.int64], bool]":
        """Return begin and end of each token, and whether they are in bytes or in characters."""
        if self._lengths is not None:
            ends = np.cumsum(self._lengths[ids])
            if len(ends) and ends[-1] == len(text.encode()):
                return ends - self._lengths[ids], ends, True
        offsets = np.array(self._tokenizer.encode(text, add_special_tokens=False).offsets, np.int64).reshape(-1, 2)
        return offsets[:, 0], offsets[:, 1], False


def overlapping(
    begins: "NDArray[np.int64]", ends: "NDArray[np.int64]", spans: Sequence[tuple[int, int]]
) -> "NDArray[np.bool_]":
    """Return (T,) whether each token overlaps a span.

    Args:
        begins: (T,) of the tokens.
        ends: (T,) of the tokens.
        spans: (begin, end), in order.
    """
    mask = np.zeros(len(begins), np.bool_)
    for begin, end in spans:
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(begins, end, side="left"))
        mask[first:last] = True
    return mask


def _is_byte_level(parsed: dict[str, Any]) -> bool:
    decoder = parsed.get("decoder") or {}
    return decoder.get("type") == "ByteLevel" and not parsed.get("normalizer")


def _token_lengths(tokenizer: Tokenizer, parsed: dict[str, Any]) -> "NDArray[np.int64]":
    """Return (V,) the number of bytes of each id; a byte-level token has one character per byte."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for text, index in vocabulary.items():
        lengths[index] = len(text)
    for token in parsed.get("added_tokens") or []:
        lengths[token["id"]] = len(str(token["content"]).encode())
    return lengths
