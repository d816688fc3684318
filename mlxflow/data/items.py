"""The items that readers of source files yield: records, texts and errors, and the limits on their size."""

from collections.abc import Callable
from typing import Any, NamedTuple

#: The largest line of JSON, JSON file, line of a table or value of a parquet file, in bytes.
MAX_RECORD_BYTES = 1 << 26

#: A longer text of a record is tokenized in pieces like a text file, so that memory never holds several copies.
LONG_TEXT_BYTES = 1 << 22

#: The largest conversation in bytes, which is rendered and tokenized as a whole; four times the longest context, 2^20.
MAX_CONVERSATION_BYTES = 1 << 24


class Record(NamedTuple):
    """One record and its position: the line it begins on, or its number, from 1, in files without lines."""

    place: int
    value: Any


class PlainText(NamedTuple):
    """A text, or a piece of one that is too long to be held; pieces end at line ends if possible."""

    text: str
    begins: bool
    ends: bool


class Bad(NamedTuple):
    """An unusable record: its position and the reason."""

    place: int
    reason: str


class RecordForm(NamedTuple):
    """The form of a source's records.

    Attributes:
        keys: a record has one of them.
        more_keys: further keys that are read.
        is_record: whether an object has all the keys of a known form.
        decode_cells: decodes a row of a table whose cells are all text; raises ValueError.
        text_key: the key of a text.
    """

    keys: frozenset[str]
    more_keys: frozenset[str]
    is_record: Callable[[Any], bool]
    decode_cells: Callable[[dict[str, Any]], dict[str, Any]]
    text_key: str = "text"


class TooLargeError(Exception):
    """A record that is too large; the message says by which measure, without position and advice."""
