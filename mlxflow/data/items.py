"""What readers of source files yield: records, texts, and notes of what cannot be used; and how large each may be."""

from collections.abc import Callable
from typing import Any, NamedTuple

#: A line of JSON, a JSON file, a line of a table or a value of a parquet file over this is refused.
MAX_RECORD_BYTES = 1 << 26

#: A text of a record over this is tokenized in pieces, as a text file is, so that it is never in memory several times.
LONG_TEXT_BYTES = 1 << 22

#: A conversation is rendered and tokenized as a whole; the longest context, 2^20 tokens, is a quarter of this.
MAX_CONVERSATION_BYTES = 1 << 24


class Record(NamedTuple):
    """One record and its place: the line it begins on, or its number in files without lines, from 1."""

    place: int
    value: Any


class PlainText(NamedTuple):
    """A text, or a piece of one too long to be held: pieces end where a line does, if one does."""

    text: str
    begins: bool
    ends: bool


class Bad(NamedTuple):
    """A record that cannot be used: its place and why."""

    place: int
    reason: str


class RecordForm(NamedTuple):
    """What the records of a source look like.

    Attributes:
        keys: a record has one of them.
        more_keys: what else of a record is read.
        is_record: whether an object has all the keys of a known form.
        decode_cells: makes what it stands for of a table's row whose cells are all text; raises ValueError.
        text_key: the key of a text.
    """

    keys: frozenset[str]
    more_keys: frozenset[str]
    is_record: Callable[[Any], bool]
    decode_cells: Callable[[dict[str, Any]], dict[str, Any]]
    text_key: str = "text"


class TooLargeError(Exception):
    """A record that is too large to be held; the text says by what measure, without its place and without advice."""
