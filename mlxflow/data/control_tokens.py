"""Control tokens inside messages are encoded as plain text; only those written by a template are control tokens.

While a template runs, such a token is enclosed in two Unicode noncharacters. They mark in the output which control
tokens came from a message. The text is then encoded by a tokenizer in which the template's control tokens are
renamed, so that the others are plain text to it.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Noncharacters: reserved by Unicode for internal use, so no text should contain them.
_LITERAL_BEGIN, _LITERAL_END, _MARK_BEGIN, _MARK_END, _NAME_BEGIN, _NAME_END = "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4\ufdd5"

#: Written around the output of a `{% generation %}` block.
GENERATED_BEGIN, GENERATED_END = "\ufdd6\ufdd7"

_OPENINGS = (_LITERAL_BEGIN, _MARK_BEGIN, GENERATED_BEGIN)
_MARKERS = re.compile("([\ufdd0-\ufdd3\ufdd6\ufdd7])")
_RESERVED = re.compile("[\ufdd0-\ufdd7]")
_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\u(fdd[0-3])")

# Tokens around an assistant's reasoning, which never count as the end of a turn.
_THOUGHTS = re.compile("think|thought", re.IGNORECASE)


class ReservedCharacterError(Exception):
    """A text contains one of the noncharacters reserved here."""


class ControlTokens:
    """The control tokens of a tokenizer.

    Args:
        texts: their texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = frozenset(texts) - {""}
        longest_first = sorted(self.texts, key=lambda text: (-len(text), text))
        tokens = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._pattern = re.compile(tokens)
        escaped = (re.escape(json.dumps(text)[1:-1]) for text in longest_first)
        self._suspects = re.compile("|".join([r"\\ufdd", *escaped]))
        self._ends = frozenset(text for text in self.texts if not _THOUGHTS.search(text))
        self._lengths = sorted({len(text) for text in self._ends}, reverse=True)

    def may_be_in(self, encoded: str) -> bool:
        """Return whether an ASCII JSON text may contain a control token or a noncharacter."""
        return self._suspects.search(encoded) is not None

    def enclosed(self, value: Any) -> Any:
        """Return a JSON value with each control token in its texts between noncharacters.

        Raises:
            ReservedCharacterError: it contains one of U+FDD0 to U+FDD7.
        """
        if isinstance(value, str):
            if _RESERVED.search(value):
                raise ReservedCharacterError
            return self._pattern.sub(rf"{_LITERAL_BEGIN}\g<0>{_LITERAL_END}", value)
        if isinstance(value, dict):
            return {self.enclosed(key): self.enclosed(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self.enclosed(one) for one in value]
        return value

    def ending(self, text: str, begin: int, end: int, literals: Sequence[tuple[int, int]] = ()) -> tuple[str, int]:
        """Return the control token at the end of a part of a text, ignoring white space, and its position.

        Args:
            text: output of a template.
            begin: of the part.
            end: of the part.
            literals: (begin, end) of control tokens that are plain text, which do not count.

        Returns:
            token: "" if there is none.
            at: its position; the end of the part if there is none.
        """
        stop = begin + len(text[begin:end].rstrip())
        for length in self._lengths:
            token = text[max(begin, stop - length) : stop]
            if token in self._ends and (stop - length, stop) not in literals:
                return token, stop - length
        return "", end

    def written(self, text: str, literals: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return (begin, end) of each control token of a text except the literals."""
        spans, at = [], 0
        for begin, end in [*literals, (len(text), len(text))]:
            spans += [match.span() for match in self._pattern.finditer(text, at, begin)]
            at = end
        return spans


def marked(value: Any) -> Any:
    """Return a JSON value with marked texts; the marks are inside white space that a template may strip."""
    if isinstance(value, str):
        core = value.strip()
        begin = value.index(core)
        return f"{value[:begin]}{_MARK_BEGIN}{core}{_MARK_END}{value[begin + len(core) :]}"
    if isinstance(value, dict):
        return {key: marked(one) for key, one in value.items()}
    return [marked(one) for one in value] if isinstance(value, list) else value


def unescaped(text: str) -> str:
    """Return a JSON text with the reserved noncharacters unescaped."""
    return _ESCAPED.sub(lambda match: match[1] + chr(int(match[2], 16)), text)


class Stripper:
    """Joins the blocks of a text and removes the noncharacters.

    Attributes:
        position: characters so far.
        literals: (begin, end) of the control tokens that were enclosed in noncharacters.
        marks: (begin, end) of the marked parts.
        generated: (begin, end) of assistant output.
        blocks: of the text.
    """

    def __init__(self) -> None:
        self.position = 0
        self.literals: list[tuple[int, int]] = []
        self.marks: list[tuple[int, int]] = []
        self.generated: list[tuple[int, int]] = []
        self.blocks: list[str] = []
        self._begins: dict[str, int] = {}

    def add(self, block: str) -> bool:
        """Add a block; return whether a marked part ended in it."""
        if block.isascii() or not _MARKERS.search(block):
            self.blocks.append(block)
            self.position += len(block)
            return False
        is_marked = False
        for part in _MARKERS.split(block):
            if part in _OPENINGS:
                self._begins[part] = self.position
            elif part == _LITERAL_END:
                self._close(_LITERAL_BEGIN, self.literals)
            elif part == GENERATED_END:
                self.generated.append((self._begins.pop(GENERATED_BEGIN), self.position))
            elif part == _MARK_END:
                self._close(_MARK_BEGIN, self.marks)
                is_marked = True
            else:
                self.blocks.append(part)
                self.position += len(part)
        return is_marked

    def _close(self, opening: str, spans: list[tuple[int, int]]) -> None:
        begin = self._begins.pop(opening, self.position)  # a template may have split a text
        if begin < self.position:
            spans.append((begin, self.position))

    def length(self, text: str) -> int:
        """Return the number of characters of a text without the noncharacters."""
        return len(text) if text.isascii() else len(_MARKERS.sub("", text))


class Encoded(NamedTuple):
    """A text's tokens.

    Attributes:
        ids: (T,)
        bounds: (T, 2) the characters of each token.
    """

    ids: "NDArray[np.uint32]"
    bounds: "NDArray[np.int64]"


class LiteralEncoder:
    """Encodes texts in which some control tokens are plain text.

    Args:
        definition: `tokenizer.json`.
        control_tokens: of the tokenizer.
    """

    def __init__(self, definition: str, control_tokens: ControlTokens) -> None:
        self._control_tokens = control_tokens
        parsed = json.loads(definition)
        self._names: dict[str, str] = {}
        ids: dict[str, int] = {}
        for number, token in enumerate(parsed.get("added_tokens") or []):
            content = str(token["content"])
            if content in control_tokens.texts:
                self._names[content] = f"{_NAME_BEGIN}{number}{_NAME_END}"
                token |= {"content": self._names[content], "normalized": False}
            ids[str(token["content"])] = int(token["id"])
        self._tokenizer = Tokenizer.from_str(json.dumps(parsed))
        self._ids = np.arange(max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1, dtype=np.uint32)
        for content, index in ids.items():
            self._ids[self._tokenizer.token_to_id(content)] = index
        known_ids = (self._tokenizer.token_to_id(content) for content in self._names)
        self._forbidden = np.array([index for index in known_ids if index is not None], np.uint32)

    def encode(self, text: str, literals: Sequence[tuple[int, int]]) -> Encoded | None:
        """Return the tokens of a text; None if the tokenizer turns even plain text into a control token.

        Args:
            text: output of a template.
            literals: (begin, end) of the control tokens in it that are plain text, in order.
        """
        pieces: list[str] = []
        begins, ends = [0], [0]  # of each piece, in the text and in the encoded text
        at = size = 0
        for begin, end in self._control_tokens.written(text, literals):
            name = self._names.get(text[begin:end])
            if name is None:
                continue
            pieces += [text[at:begin], name]
            for piece, stop in zip(pieces[-2:], (begin, end), strict=True):
                size += len(piece)
                begins.append(stop)
                ends.append(size)
            at = end
        encoding = self._tokenizer.encode("".join([*pieces, text[at:]]), add_special_tokens=False)
        raw = np.array(encoding.ids, np.uint32)
        if np.isin(raw, self._forbidden).any():
            return None
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return Encoded(self._ids[raw], _translated(offsets, np.array(ends), np.array(begins), len(text)))


def _translated(
    offsets: "NDArray[np.int64]", source: "NDArray[np.int64]", target: "NDArray[np.int64]", length: int
) -> "NDArray[np.int64]":
    """Translate positions in one text to positions in another, given the starts of the pieces of both."""
    piece = np.searchsorted(source, offsets, side="right") - 1
    limits = np.append(target[1:], length)
    moved: NDArray[np.int64] = np.minimum(target[piece] + offsets - source[piece], limits[piece])
    return moved
