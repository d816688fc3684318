"""Lines of JSON of several megabytes: only what is read of them is decoded, and a long text comes in parts."""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from mlxflow.data import decompression, items
from mlxflow.data.items import RecordForm, TooLargeError

#: Shorter lines are decoded whole.
LONG_LINE_BYTES = 1 << 20

#: Strings, commas and opening brackets of a long line: what it is decoded to takes up to 100 bytes for each of them.
MAX_LINE_VALUES = 1 << 20

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
# The part of a JSON string that ends before the first escape sequence that is cut off
_WHOLE_ESCAPES = re.compile(
    rb"(?:[^\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u])*+", re.DOTALL
)
_LEAST_PART_BYTES = 64


class LongText:
    """A text of several megabytes as it stands in a line of JSON.

    Args:
        raw: its JSON, with the quotation marks.
    """

    def __init__(self, raw: msgspec.Raw) -> None:
        self._raw = raw

    def parts(self) -> Iterator[bytes]:
        """Yield the text in parts of at most about a megabyte, UTF-8.

        Raises:
            ValueError: it is not UTF-8; the text is for people.
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
    """Return the length of the beginning of a part of a JSON string in which no character is cut apart."""
    if end := part.rfind(b" ") + 1:  # no escape sequence holds a space
        return end
    match = _WHOLE_ESCAPES.match(part)
    end = match.end() if match else 0
    while end > 1 and part[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if end > 1 and part[end - 1] >= 0xC0 else end


def decode_long(line: bytes | bytearray, form: RecordForm, decode: Callable[[bytes], Any]) -> Any:
    """Return what is read of the JSON object in a long line, a long text as `LongText`; [] for what is no object.

    Args:
        line: the line.
        form: of the records.
        decode: turns the JSON of a value into the value.

    Raises:
        ValueError: it is no valid JSON; the text is for people.
        TooLargeError: it holds too much beside a text.
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
    found: dict[str, Any] = {}
    size = 0
    for name, raw in zip(sorted(names), msgspec.structs.astuple(known), strict=True):
        data = memoryview(raw)
        if name == form.text_key and len(data) > items.LONG_TEXT_BYTES and data[0] == ord('"'):
            found[name] = LongText(raw)
        elif len(data):
            size += len(data)
            if size > items.MAX_CONVERSATION_BYTES:
                raise TooLargeError(f"holds a conversation of over {items.MAX_CONVERSATION_BYTES:,} bytes")
            require_few_values(bytes(data), MAX_LINE_VALUES)
            found[name] = decode(bytes(data))
    return found


@functools.lru_cache(maxsize=16)
def _decoder(names: frozenset[str]) -> "msgspec.json.Decoder[Any]":
    """Return what decodes an object to the JSON of the values of some keys, and passes all other keys over."""
    fields = {f"value_{number}": name for number, name in enumerate(sorted(names))}
    empty = msgspec.Raw()
    return msgspec.json.Decoder(
        msgspec.defstruct("Known", [(field, msgspec.Raw, empty) for field in fields], rename=fields)
    )


def require_few_values(data: bytes | bytearray, most: int) -> None:
    """Refuse JSON that would take a multiple of its size when it is decoded.

    Args:
        data: the JSON.
        most: strings, commas and opening brackets.

    Raises:
        TooLargeError: it has more of them.
    """
    marks = (b",", b"[", b"{")
    if sum(data.count(mark) for mark in marks) + data.count(b'"') // 2 <= most:
        return  # those in strings counted as well
    count = end = 0
    for string in _STRING.finditer(data):
        count += 1 + sum(data.count(mark, end, string.start()) for mark in marks)
        end = string.end()
        if count > most:
            break
    if count + sum(data.count(mark, end) for mark in marks) > most:
        raise TooLargeError(f"has over {most:,} values")
