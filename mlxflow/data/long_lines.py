"""Decode JSON lines of several megabytes: only the needed keys, and a long text in parts."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from mlxflow.data import decompression, items
from mlxflow.data.items import RecordForm, TooLargeError

#: Shorter lines are decoded whole.
LONG_LINE_BYTES = 1 << 20

#: The most strings, commas and opening brackets of a long line; decoded, each takes up to 100 bytes.
MAX_LINE_VALUES = 1 << 20

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
# The part of a JSON string before an escape sequence that is cut off
_WHOLE_ESCAPES = re.compile(
    rb"(?:[^\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u])*+", re.DOTALL
)
_LEAST_PART_BYTES = 64


class LongText:
    """A text of several megabytes in its JSON encoding.

    Args:
        raw: its JSON, including the quotation marks.
    """

    def __init__(self, raw: msgspec.Raw) -> None:
        self._raw = raw

    def parts(self) -> Iterator[bytes]:
        """Yield the text in parts of at most about a megabyte, UTF-8.

        Raises:
            ValueError: it is not UTF-8; the message is for the user.
        """
        data = memoryview(self._raw)
        size = max(decompression.PIECE_BYTES, _LEAST_PART_BYTES)
        begin, last = 1, len(data) - 1
        while begin < last:
            part = bytes(data[begin : min(begin + size, last)])
            end = len(part) if begin + len(part) == last else _whole_length(part)
            try:
                part[:end].decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"byte {begin + error.start:,} of its text is not UTF-8") from error
            yield msgspec.json.decode(b'"' + part[:end] + b'"', type=str).encode()
            begin += end

    def text(self) -> str:
        """Return the whole text."""
        return str(msgspec.json.decode(self._raw, type=str))


def _whole_length(part: bytes) -> int:
    """Return the length of the longest prefix of a part of a JSON string that splits no character."""
    if end := part.rfind(b" ") + 1:  # no escape sequence contains a space
        return end
    match = _WHOLE_ESCAPES.match(part)
    end = match.end() if match else 0
    while end > 1 and part[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if end > 1 and part[end - 1] >= 0xC0 else end


def decode_long(line: bytes | bytearray, form: RecordForm, decode: Callable[[bytes], Any]) -> Any:
    """Return the needed keys of the JSON object in a long line, a long text as `LongText`; [] for other values.

    Args:
        line: the line.
        form: of the records.
        decode: decodes the JSON of a value.

    Raises:
        ValueError: it is no valid JSON; the message is for the user.
        TooLargeError: it has too many values besides a text.
    """
    names = form.keys | form.more_keys
    try:
        known = _decoder(names).decode(line)
    except msgspec.ValidationError:
        return []
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except msgspec.DecodeError as error:
        raise ValueError(str(error).removeprefix("JSON is malformed: ")) from error
    values: dict[str, Any] = {}
    size = 0
    for name, raw in zip(sorted(names), msgspec.structs.astuple(known), strict=True):
        data = memoryview(raw)
        if name == form.text_key and len(data) > items.LONG_TEXT_BYTES and data[0] == ord('"'):
            values[name] = LongText(raw)
        elif len(data):
            size += len(data)
            if size > items.MAX_CONVERSATION_BYTES:
                raise TooLargeError(f"holds a conversation of over {items.MAX_CONVERSATION_BYTES:,} bytes")
            require_few_values(bytes(data), MAX_LINE_VALUES)
            values[name] = decode(bytes(data))
    return values


@functools.lru_cache(maxsize=16)
def _decoder(names: frozenset[str]) -> "msgspec.json.Decoder[Any]":
    """Return a decoder of objects that keeps the JSON of some keys' values and skips all other keys."""
    fields = {f"value_{number}": name for number, name in enumerate(sorted(names))}
    empty = msgspec.Raw()
    return msgspec.json.Decoder(
        msgspec.defstruct("Known", [(field, msgspec.Raw, empty) for field in fields], rename=fields)
    )


def require_few_values(data: bytes | bytearray, most: int) -> None:
    """Refuse JSON that would take a multiple of its size when decoded.

    Args:
        data: the JSON.
        most: maximum number of strings, commas and opening brackets.

    Raises:
        TooLargeError: it has more.
    """
    marks = (b",", b"[", b"{")
    if sum(data.count(mark) for mark in marks) + data.count(b'"') // 2 <= most:
        return  # including those inside strings
    count = end = 0
    for string in _STRING.finditer(data):
        count += 1 + sum(data.count(mark, end, string.start()) for mark in marks)
        end = string.end()
        if count > most:
            break
    if count + sum(data.count(mark, end) for mark in marks) > most:
        raise TooLargeError(f"has over {most:,} values")
