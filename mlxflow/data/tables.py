"""Read the rows of a CSV file as records."""

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mlxflow.data import items, texts
from mlxflow.data.decompression import FileProblem
from mlxflow.data.items import Bad, PlainText, Record, RecordForm
from mlxflow.data.json_records import listed

_ROWS_PER_BATCH = 1024

# The csv module makes a list of all fields of a line: a line of commas takes a multiple of its size.
_LONG_LINE_BYTES = 1 << 20
_MAX_FIELDS = 1 << 20


def read_csv(pieces: Iterable[bytes], form: RecordForm, *, strict: bool) -> Iterator[list[Record | PlainText | Bad]]:
    """Yield the rows of a CSV file as records, or the file as a text if it has no known column.

    Args:
        pieces: of the file.
        form: of its records.
        strict: a file without a known column is an error.

    Raises:
        FileProblem: it is not UTF-8, or it is not valid CSV.
    """
    csv.field_size_limit(items.MAX_RECORD_BYTES)
    iterator = iter(pieces)
    head = next(iterator, b"")
    texts.refuse_binary(head[: texts.SNIFFED_BYTES])
    if not form.keys & set(_header_of(head)):
        if strict:
            raise FileProblem(f"has no column {listed(form.keys)}. Change the file or name its column in text_key")
        yield from texts.read_text(itertools.chain([head], iterator))
        return
    reader = csv.reader(_lines_of(itertools.chain([head], iterator)))
    batch: list[Record | PlainText | Bad] = []
    begin, size = 1, 0
    try:
        names = next(reader)
        known = {name: index for index, name in enumerate(names) if name in form.keys | form.more_keys}
        begin = reader.line_num + 1
        for row in reader:
            if row:  # not a blank line
                batch.append(_row(begin, len(names), known, row, form))
                size += sum(map(len, row))
            begin = reader.line_num + 1
            if len(batch) == _ROWS_PER_BATCH or size > items.LONG_TEXT_BYTES:
                yield batch
                batch, size = [], 0
    except csv.Error as error:
        raise FileProblem(f"line {begin:,}: not valid CSV ({error}). Fix the line") from error
    yield batch


def _header_of(head: bytes) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(head.decode("utf-8-sig", errors="replace"), newline="")), [])
    except csv.Error:
        return []


def _row(place: int, width: int, known: Mapping[str, int], row: list[str], form: RecordForm) -> Record | Bad:
    """Return a row's cells in the known columns; the time does not depend on the number of other columns."""
    if any(row[width:]):
        return Bad(place, f"has {len(row):,} fields, the header {width:,}. Quote a field with commas in it")
    cells: dict[str, Any] = {name: row[index] if index < len(row) else None for name, index in known.items()}
    try:
        return Record(place, form.decode_cells(cells))
    except ValueError as error:
        return Bad(place, f"messages that are not valid JSON ({error}). Fix the line")


def _lines_of(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield lines with line ends, as the csv module expects.

    Raises:
        csv.Error: a line is too long or has too many fields.
        FileProblem: it is not UTF-8.
    """
    offset, rest = 0, bytearray()
    for piece in pieces:
        cut = piece.rfind(b"\n") + 1
        if cut:
            data = bytes(rest) + piece[:cut]
            yield from _split(data, offset, long=len(rest) > _LONG_LINE_BYTES)
            offset += len(data)
            rest = bytearray(memoryview(piece)[cut:])
        else:
            rest += piece
        if len(rest) > items.MAX_RECORD_BYTES:
            raise csv.Error(f"over {items.MAX_RECORD_BYTES:,} bytes without an end")
    yield from _split(bytes(rest), offset, long=len(rest) > _LONG_LINE_BYTES)


def _split(data: bytes, offset: int, *, long: bool) -> Iterator[str]:
    if long and data.count(b",") > max(_MAX_FIELDS, len(data) // 2):
        raise csv.Error(f"over {_MAX_FIELDS:,} fields")
    yield from io.StringIO(texts.decode(data, offset, bom=offset == 0), newline="")
