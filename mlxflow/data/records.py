"""From the bytes of a source file to its records: lines of JSON, rows of a table, or one text.

What is wrong with a single record is a `Bad` beside the good ones; what is wrong with the whole file is a
`streams.FileProblem`. Both say where and why; the caller decides what that means.
"""

import codecs
import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mlxflow.data import json_records
from mlxflow.data.streams import PIECE_BYTES, FileProblem, read_pieces, telling
from mlxflow.errors import SourceError
from mlxflow.identity import digest_file
from mlxflow.paths import printable

#: A line of JSON, a JSON file or a field of a table over this is refused: it has to be in memory whole, several times.
MAX_RECORD_BYTES = 1 << 26

_SNIFFED_BYTES = 8192
# UTF-32 before UTF-16: the mark of one begins with that of the other
_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_ROWS_PER_BATCH = 1024

#: How files are read, by the last suffix that is no compression; any other file is text.
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Record(NamedTuple):
    """One record and its place: the line it begins on, or its number in files without lines, from 1."""

    place: int
    value: Any


class Text(NamedTuple):
    """A text, or a piece of one too long to be held: pieces end where a line does, if one does."""

    text: str
    begins: bool
    ends: bool


class Bad(NamedTuple):
    """A record that cannot be used: its place and why."""

    place: int
    reason: str


class Shape(NamedTuple):
    """What tells how a file is read, and nothing else of it: part of the key of its shard.

    Attributes:
        kind: "text", "jsonl", "json", "csv" or "parquet".
        compression: "", "gz" or "zst".
    """

    kind: str
    compression: str

    @classmethod
    def of(cls, path: Path) -> "Shape":
        """Return the shape that a file's name promises."""
        suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
        compression = suffixes.pop()[1:] if suffixes and suffixes[-1] in (".gz", ".zst") else ""
        kind = _KINDS.get(suffixes[-1], "text") if suffixes else "text"
        return cls("text" if compression and kind == "parquet" else kind, compression)


class RecordForm(NamedTuple):
    """What the records of a source look like.

    Attributes:
        keys: of which a record has one.
        more_keys: what else of a record is read.
        is_record: whether an object has all the keys of a known form.
        decode_cells: makes what it stands for of a table's row whose cells are all text; raises ValueError.
    """

    keys: frozenset[str]
    more_keys: frozenset[str]
    is_record: Callable[[Any], bool]
    decode_cells: Callable[[dict[str, Any]], dict[str, Any]]


class Binary(FileProblem):
    """A file with a NUL byte near its beginning: no text."""


def read_file(
    path: Path,
    shape: Shape,
    *,
    expected_digest: str,
    form: "RecordForm",
    strict: bool,
    on_read: Callable[[int], None],
) -> Iterator[list[Record | Text | Bad]]:
    """Yield the records of a file in batches of a few megabytes.

    Args:
        path: the file.
        shape: how it is read.
        expected_digest: xxh3-128 of its bytes; another one means that it changed meanwhile.
        form: of its records; a .json or .csv file without any is a text like any other file ...
        strict: ... unless this is set; then it is a problem.
        on_read: called with each number of bytes read.

    Raises:
        FileProblem: the file as a whole cannot be used.
        SourceError: it changed, vanished or became unreadable, or a library is missing.
    """
    if shape.kind == "parquet":
        with telling(path):
            yield from _read_parquet(path, form)
            on_read(path.stat().st_size)
            if digest_file(path).content != expected_digest:
                raise SourceError(f"{printable(str(path))}: changed while it was read. Run the stage again.")
        return
    pieces = read_pieces(path, compression=shape.compression, expected_digest=expected_digest, on_read=on_read)
    if shape.kind == "jsonl":
        yield from _read_lines(pieces)
    elif shape.kind == "json":
        yield from _read_json(pieces, form, strict=strict)
    elif shape.kind == "csv":
        yield from _read_csv(pieces, form, strict=strict)
    else:
        yield from _read_text(pieces)


# --- text


def _read_text(pieces: Iterable[bytes]) -> Iterator[list[Record | Text | Bad]]:
    """Yield a text in pieces that end where a line ends, else a word, else a character."""
    offset, rest, begins = 0, b"", True
    for piece in pieces:
        data = rest + piece
        if begins and offset == 0:
            _refuse_binary(data[:_SNIFFED_BYTES])
        cut = len(data) if len(data) < PIECE_BYTES else _last_break(data)
        text, rest = data[:cut], data[cut:]
        if cut == len(data) and len(data) < PIECE_BYTES:
            rest, text = data, b""  # it may be the last one
        if text:
            yield [Text(_decode(text, offset, bom=begins), begins, ends=False)]
            offset, begins = offset + len(text), False
    if rest or not begins:
        yield [Text(_decode(rest, offset, bom=begins), begins, ends=True)]


def _last_break(data: bytes) -> int:
    for mark in (b"\n", b" "):
        if found := data.rfind(mark) + 1:
            return found
    end = len(data)
    while end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end - 1 if data[end - 1] >= 0xC0 else len(data)


def _decode(data: bytes, offset: int, *, bom: bool) -> str:
    nul = data.find(b"\0")
    try:
        text = data.decode("utf-8-sig" if bom else "utf-8")
    except UnicodeDecodeError as error:
        skipped = 3 if bom and data.startswith(b"\xef\xbb\xbf") else 0
        at = error.start + skipped
        if nul < 0 or at < nul:
            raise FileProblem(f"byte {offset + at:,} is not UTF-8. Save the file as UTF-8") from error
    if nul >= 0:
        raise FileProblem(f"byte {offset + nul:,} is NUL. Remove it")
    return text


def _refuse_binary(head: bytes) -> None:
    _refuse_encoding(head)
    if (nul := head.find(b"\0")) >= 0:
        raise Binary(f"byte {nul:,} is NUL: no text. Leave the file out")


def _refuse_encoding(head: bytes) -> None:
    """Refuse text in UTF-16 or UTF-32, known by its mark, or without one by the places of its NUL bytes.

    Raises:
        FileProblem: the beginning of a file is such text.
    """
    codec = next((codec for mark, codec in _WIDE_MARKS.items() if head.startswith(mark)), None)
    nuls = [half.count(0) > 0.6 * len(half) for half in (head[::2], head[1::2])]
    if codec is None and len(head) >= 4 and nuls[0] != nuls[1]:
        codec = "utf-16-be" if nuls[0] else "utf-16-le"
    text = head[: len(head) // 4 * 4].decode(codec, errors="replace") if codec else ""
    printable = sum(one.isprintable() or one.isspace() for one in text.lstrip("\ufeff"))
    if codec and printable >= 0.9 * len(text.lstrip("\ufeff")):
        raise FileProblem(f"is {codec[:6].upper()}, not UTF-8. Save the file as UTF-8")


# --- lines of JSON


def _read_lines(pieces: Iterable[bytes]) -> Iterator[list[Record | Text | Bad]]:
    rest: list[bytes] = []
    number, first, dropping, size = 1, True, 0, 0
    for whole in pieces:
        if first:
            _refuse_encoding(whole[:_SNIFFED_BYTES])
        piece = whole.removeprefix(b"\xef\xbb\xbf") if first else whole
        first = False
        cut = piece.rfind(b"\n") + 1
        if not cut:
            size += len(piece)
            rest = [*rest, piece] if size <= MAX_RECORD_BYTES else []
            dropping = size if size > MAX_RECORD_BYTES else 0
            continue
        batch: list[Record | Text | Bad] = []
        data = piece[:cut]
        if dropping:
            end = data.index(b"\n")
            batch.append(_too_long(number, dropping + end))
            data, number, dropping = data[end + 1 :], number + 1, 0
            lines = data.split(b"\n")[:-1]
        else:
            lines = b"".join([*rest, data]).split(b"\n")[:-1]
        batch += _parse_lines(lines, number)
        number += len(lines)
        rest, size = [piece[cut:]], len(piece) - cut
        yield batch
    if dropping:
        yield [_too_long(number, dropping)]
    else:
        yield list(_parse_lines([b"".join(rest)], number))


def _too_long(number: int, size: int) -> Bad:
    return Bad(number, f"has {size:,} bytes, {MAX_RECORD_BYTES:,} are the most. Split the record")


_decode_fast = msgspec.json.Decoder().decode


def _decode_json(data: bytes) -> Any:
    """Return a JSON value; msgspec reads it, and the standard library where that finds a fault, to say it better.

    Raises:
        ValueError: it is none; the text is for people.
    """
    try:
        return _decode_fast(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        pass  # the standard library also takes NaN
    try:
        return json.loads(data.decode("utf-8-sig"))  # of bytes it would guess the encoding
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is not UTF-8") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno:,} " if error.lineno > 1 else ""
        said = error.msg.rstrip(": ").removesuffix(" at")
        raise ValueError(f"{said} at {line}column {error.colno:,}") from error


def _parse_lines(lines: list[bytes], number: int) -> Iterator[Record | Bad]:
    for at, line in enumerate(lines, number):
        if len(line) > MAX_RECORD_BYTES:
            yield _too_long(at, len(line))
            continue
        try:
            yield Record(at, _decode_json(line))
        except ValueError as error:
            if line and not line.isspace():
                yield Bad(at, f"not valid JSON ({error}). Fix the line")


# --- whole JSON files and tables


def _read_json(pieces: Iterable[bytes], form: RecordForm, *, strict: bool) -> Iterator[list[Record | Text | Bad]]:
    data = b""
    for piece in pieces:
        data += piece
        if len(data) > MAX_RECORD_BYTES:
            raise FileProblem(f"is a JSON file of over {MAX_RECORD_BYTES:,} bytes. Write its records as .jsonl")
    _refuse_encoding(data[:_SNIFFED_BYTES])
    body = data.removeprefix(b"\xef\xbb\xbf")
    if not body.strip():
        return
    try:
        value = _decode_json(body)
    except ValueError as error:
        if json_records.first_line_is_object(body, _decode_json):
            yield from _read_lines([data])
            return
        raise FileProblem(f"not valid JSON ({error}). Fix the file") from error
    found = json_records.find_records(value, form.keys, form.is_record)
    if found is not None:
        records = [Record(number, one) for number, one in enumerate(found, 1)]
        yield from json_records.batches(records, _ROWS_PER_BATCH)
    elif strict:
        raise FileProblem(f"expected a list of objects with {_list(form.keys)}. Change the file or its format")
    else:
        yield from _read_text([data])


def _list(names: Iterable[str]) -> str:
    return " or ".join(f'"{name}"' for name in sorted(names))


def _read_csv(pieces: Iterable[bytes], form: RecordForm, *, strict: bool) -> Iterator[list[Record | Text | Bad]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    iterator = iter(pieces)
    head = next(iterator, b"")
    _refuse_binary(head[:_SNIFFED_BYTES])
    if not form.keys & set(_header_of(head)):
        if strict:
            raise FileProblem(f"has no column {_list(form.keys)}. Change the file or name its column in text_key")
        yield from _read_text(itertools.chain([head], iterator))
        return
    reader = csv.reader(_lines_of(itertools.chain([head], iterator)))
    batch: list[Record | Text | Bad] = []
    begin = 1
    try:
        names = next(reader)
        begin = reader.line_num + 1
        for row in reader:
            if row:  # no blank line
                batch.append(_row(begin, names, row, form))
            begin = reader.line_num + 1
            if len(batch) == _ROWS_PER_BATCH:
                yield batch
                batch = []
    except csv.Error as error:
        raise FileProblem(f"line {begin:,}: not valid CSV ({error}). Fix the line") from error
    yield batch


def _header_of(head: bytes) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(head.decode("utf-8-sig", errors="replace"), newline="")), [])
    except csv.Error:
        return []


def _row(place: int, names: list[str], row: list[str], form: RecordForm) -> Record | Bad:
    if any(row[len(names) :]):
        return Bad(place, f"has {len(row):,} fields, the header {len(names):,}. Quote a field with commas in it")
    try:
        return Record(place, form.decode_cells(dict(itertools.zip_longest(names, row[: len(names)]))))
    except ValueError as error:
        return Bad(place, f"messages that are not valid JSON ({error}). Fix the line")


def _lines_of(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield lines with their ends as the csv module wants them.

    Raises:
        csv.Error: a line is too long to be held.
    """
    offset, rest = 0, b""
    for piece in pieces:
        data = rest + piece
        cut = data.rfind(b"\n") + 1
        yield from io.StringIO(_decode(data[:cut], offset, bom=offset == 0), newline="")
        offset, rest = offset + cut, data[cut:]
        if len(rest) > MAX_RECORD_BYTES:
            raise csv.Error(f"over {MAX_RECORD_BYTES:,} bytes without an end")
    yield from io.StringIO(_decode(rest, offset, bom=offset == 0), newline="")


def _read_parquet(path: Path, form: RecordForm) -> Iterator[list[Record | Text | Bad]]:
    try:
        import pyarrow.lib
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise SourceError(f"{printable(str(path))}: needs pyarrow. Run: pip install 'mlxflow[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in form.keys | form.more_keys]
            if not form.keys.intersection(columns):
                raise FileProblem(
                    f"has no column {_list(form.keys)}; its columns: {', '.join(file.schema_arrow.names)}. "
                    "Name one in text_key"
                )
            number = 1
            for rows in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=columns):
                end = number + rows.num_rows
                try:
                    values = rows.to_pylist()
                except UnicodeDecodeError as error:
                    raise FileProblem(
                        f"a text in rows {number:,} to {end - 1:,} is not UTF-8. Write it anew"
                    ) from error
                yield [Record(place, value) for place, value in enumerate(values, number)]
                number = end
    except (pyarrow.lib.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the operating system says it, not the format
        raise FileProblem(f"is no valid parquet file ({' '.join(str(error).split())})") from error
