"""Read JSON: a single value, one value per line, or the records of a whole file."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import msgspec

from mlxflow.data import items, texts
from mlxflow.data.decompression import FileProblem
from mlxflow.data.items import Bad, PlainText, Record, RecordForm
from mlxflow.data.long_lines import LONG_LINE_BYTES, decode_long, require_few_values

# Objects that are checked to recognize a list of records
_SEEN = 100
_RECORDS_PER_BATCH = 1024
_MAX_FILE_VALUES = 1 << 22

_decode_fast = msgspec.json.Decoder().decode


def decode_json(data: bytes | bytearray) -> Any:
    """Return a JSON value, parsed by msgspec; after an error by the standard library, for a better message.

    Raises:
        ValueError: it is invalid; the message is for the user.
    """
    try:
        return _decode_fast(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        pass  # the standard library also accepts NaN
    try:
        return json.loads(data.decode("utf-8-sig"))  # for bytes it would guess the encoding
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is not UTF-8") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno:,} " if error.lineno > 1 else ""
        reason = error.msg.rstrip(": ").removesuffix(" at")
        raise ValueError(f"{reason} at {line}column {error.colno:,}") from error
    except ValueError as error:  # the only remaining cause
        raise ValueError("a number has too many digits") from error


# --- one value per line


def read_lines(pieces: Iterable[bytes], form: RecordForm) -> Iterator[list[Record | PlainText | Bad]]:
    """Yield the records of a file with one JSON value per line; a line of several megabytes is a separate batch.

    Args:
        pieces: of the file.
        form: of its records.

    Raises:
        FileProblem: it is not UTF-8.
    """
    rest, dropped = bytearray(), 0  # bytes of a line that began in an earlier piece, and the number of dropped ones
    number = 1
    for piece in _without_mark(pieces):
        begin = 0
        if rest or dropped:
            end = piece.find(b"\n")
            begin = len(piece) if end < 0 else end + 1
            rest += memoryview(piece)[: begin if end < 0 else end]
            if dropped or len(rest) > items.MAX_RECORD_BYTES:
                rest, dropped = bytearray(), dropped + len(rest)
            if end < 0:
                continue
            line, rest = rest, bytearray()
            yield [_too_long(number, dropped)] if dropped else list(_parse_lines([line], number, form))
            del line
            number, dropped = number + 1, 0
        stop = piece.rfind(b"\n", begin) + 1
        if stop:
            lines = piece[begin:stop].split(b"\n")[:-1]
            yield list(_parse_lines(lines, number, form))
            number += len(lines)
        rest += memoryview(piece)[stop or begin :]
        if len(rest) > items.MAX_RECORD_BYTES:
            rest, dropped = bytearray(), len(rest)
    yield [_too_long(number, dropped)] if dropped else list(_parse_lines([rest], number, form))


def _without_mark(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the pieces of a UTF-8 file without its byte order mark.

    Raises:
        FileProblem: it is not UTF-8.
    """
    for index, piece in enumerate(pieces):
        if index == 0:
            texts.refuse_encoding(piece[: texts.SNIFFED_BYTES])
        yield piece.removeprefix(b"\xef\xbb\xbf") if index == 0 else piece


def _too_long(number: int, size: int) -> Bad:
    return Bad(number, f"has {size:,} bytes, {items.MAX_RECORD_BYTES:,} are the most. Split the record")


def _parse_lines(lines: Sequence[bytes | bytearray], number: int, form: RecordForm) -> Iterator[Record | Bad]:
    for at, line in enumerate(lines, number):
        if not line or line.isspace():
            continue
        if len(line) > items.MAX_RECORD_BYTES:
            yield _too_long(at, len(line))
            continue
        try:
            yield Record(
                at, decode_json(line) if len(line) <= LONG_LINE_BYTES else decode_long(line, form, decode_json)
            )
        except ValueError as error:
            yield Bad(at, f"not valid JSON ({error}). Fix the line")
        except items.TooLargeError as error:
            yield Bad(at, f"{error}. Split the record")


# --- a whole file


def read_json(pieces: Iterable[bytes], form: RecordForm, *, strict: bool) -> Iterator[list[Record | PlainText | Bad]]:
    """Yield the records of a JSON file, or the file as a text if it has none.

    Args:
        pieces: of the file.
        form: of its records.
        strict: a file without records is an error.

    Raises:
        FileProblem: it is too large or not valid JSON.
    """
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) > items.MAX_RECORD_BYTES:
            raise FileProblem(f"is a JSON file of over {items.MAX_RECORD_BYTES:,} bytes. Write its records as .jsonl")
    texts.refuse_encoding(bytes(data[: texts.SNIFFED_BYTES]))
    body = data[3:] if data.startswith(b"\xef\xbb\xbf") else data
    if not body.strip():
        return
    try:
        if len(body) > LONG_LINE_BYTES:
            require_few_values(body, _MAX_FILE_VALUES)
        value = decode_json(body)
    except items.TooLargeError as error:
        raise FileProblem(f"is a JSON file that {error}. Write its records as .jsonl") from error
    except ValueError as error:
        if first_line_is_object(body, decode_json):
            yield from read_lines([bytes(data)], form)
            return
        raise FileProblem(f"not valid JSON ({error}). Fix the file") from error
    records = find_records(value, form.keys, form.is_record)
    if records is not None:
        yield from batches([Record(number, one) for number, one in enumerate(records, 1)], _RECORDS_PER_BATCH)
    elif strict:
        raise FileProblem(f"expected a list of objects with {listed(form.keys)}. Change the file or its format")
    else:
        yield from texts.read_text([bytes(data)])


def listed(names: Iterable[str]) -> str:
    """Return names of keys for messages."""
    return " or ".join(f'"{name}"' for name in sorted(names))


def find_records(value: Any, record_keys: Set[str], is_record: Callable[[Any], bool]) -> list[Any] | None:
    """Return the records of a JSON value; None without records of a known form.

    Accepted are a list of objects, at least one with a known key, an object that is a record, and an object with one
    such list under any key, such as {"version": 1, "data": [...]}.

    Args:
        value: the content of a file.
        record_keys: a record has one of these keys.
        is_record: whether an object has all the keys of a known form.

    Raises:
        FileProblem: it contains several lists of records.
    """
    if isinstance(value, list):
        has_keys = any(isinstance(one, dict) and record_keys & one.keys() for one in value[:_SEEN])
        return value if has_keys else None
    if not isinstance(value, dict):
        return None
    if is_record(value):
        return [value]
    lists = {
        key: one for key, one in value.items() if isinstance(one, list) and any(is_record(item) for item in one[:_SEEN])
    }
    if len(lists) > 1:
        names = " and ".join(f'"{key}"' for key in lists)
        raise FileProblem(f"holds several lists of records, {names}. Write each to a file of its own")
    return next(iter(lists.values()), None)


def first_line_is_object(data: bytes | bytearray, decode: Callable[[bytes | bytearray], Any]) -> bool:
    """Return whether a file has one JSON object per line, like `.json` files of the datasets library."""
    line, _, rest = data.lstrip().partition(b"\n")
    if not rest.strip():
        return False
    try:
        return isinstance(decode(line), dict)
    except ValueError:
        return False


def batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Yield the items in batches of a given size."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
