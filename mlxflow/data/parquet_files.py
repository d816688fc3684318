"""Read the rows of a parquet file as records, in memory proportional to the file's size.

A few bytes of such a file can encode any number of rows or a long value in each row. So decoded bytes are counted,
and only as many rows are decoded at a time as fit into a few megabytes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxflow.data import items
from mlxflow.data.decompression import FileProblem, require_plausible
from mlxflow.data.items import Bad, PlainText, Record, RecordForm
from mlxflow.data.json_records import listed
from mlxflow.data.long_lines import MAX_LINE_VALUES
from mlxflow.messages.errors import SourceError, reason_of
from mlxflow.storage.paths import printable

_MOST_ROWS_PER_BATCH = 1024
_BATCH_BYTES = 1 << 25
# Bytes per row besides its values.
_ROW_BYTES = 16
_VALUE_BYTES = 8
_NAMED_COLUMNS, _MOST_OF_A_NAME = 10, 40


def read_parquet(path: Path, form: RecordForm) -> Iterator[list[Record | PlainText | Bad]]:
    """Yield the known columns of a parquet file's rows.

    Raises:
        FileProblem: it is no valid parquet file, has no known column, or expands to a large multiple of its size.
        SourceError: pyarrow is missing.
        OSError: it cannot be read.
    """
    try:
        import pyarrow.lib
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise SourceError(f"{printable(str(path))}: needs pyarrow. Run: pip install 'mlxflow[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield from _rows(file, path, form)
    except UnicodeDecodeError as error:  # invalid text in a row is reported where it is read
        raise FileProblem("is no valid parquet file (a name in its footer is not UTF-8)") from error
    except (pyarrow.lib.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the operating system, not of the format
        raise FileProblem(f"is no valid parquet file ({printable(reason_of(error))})") from error


def _rows(file: Any, path: Path, form: RecordForm) -> Iterator[list[Record | PlainText | Bad]]:
    names = file.schema_arrow.names
    columns = [name for name in names if name in form.keys | form.more_keys]
    if not form.keys.intersection(columns):
        shown = printable(", ".join(name[:_MOST_OF_A_NAME] for name in names[:_NAMED_COLUMNS]))
        shown += ", ..." * (len(names) > _NAMED_COLUMNS)
        raise FileProblem(f"has no column {listed(form.keys)}; its columns: {shown}. Name one in text_key")
    stored = path.stat().st_size
    groups = range(file.num_row_groups)
    require_plausible(sum(file.metadata.row_group(group).total_byte_size for group in groups), stored)
    for group in groups:  # pyarrow aborts the process when accessing a damaged footer, but raises when reading one
        next(file.iter_batches(batch_size=1, row_groups=[group], columns=columns), None)
    chunks = [_chunks_of(file, group, columns) for group in groups]
    require_plausible(sum(_decoded_bytes(one) for group in chunks for one in group), stored)
    number, total = 1, 0
    for group, members in enumerate(chunks):
        rows = _rows_per_batch(path, members, file.metadata.row_group(group).num_rows)
        for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
            total += batch.nbytes + _ROW_BYTES * batch.num_rows
            require_plausible(total, stored)
            for part in _parts(batch):
                yield _records(part, number)
                number += part.num_rows


def _chunks_of(file: Any, group: int, columns: Sequence[str]) -> list[Any]:
    """Return the footer's metadata of some columns in a row group, including columns nested in lists and structs."""
    row_group = file.metadata.row_group(group)
    chunks = (row_group.column(index) for index in range(row_group.num_columns))
    return [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]


def _decoded_bytes(chunk: Any) -> int:
    return max(int(chunk.total_uncompressed_size), _VALUE_BYTES * int(chunk.num_values))


def _rows_per_batch(path: Path, chunks: Sequence[Any], num_rows: int) -> int:
    """Return the number of rows that fit into a batch even if each has the largest value of a dictionary."""
    plain = sum(_decoded_bytes(one) for one in chunks) // max(1, num_rows)
    repeated = sum(_dictionary_bytes(path, chunk) for chunk in chunks)
    return max(1, min(_MOST_ROWS_PER_BATCH, _BATCH_BYTES // max(1, plain, repeated)))


def _dictionary_bytes(path: Path, chunk: Any) -> int:
    """Return the size of the dictionary of a column chunk from its page header; 0 without one.

    The header is a Thrift struct in the compact protocol: the page's type and its size are the first two fields.
    """
    if not chunk.has_dictionary_page or chunk.dictionary_page_offset is None:
        return 0
    with path.open("rb") as file:
        file.seek(chunk.dictionary_page_offset)
        head = file.read(16)
    at, numbers = 0, []
    for _ in range(2):
        if head[at : at + 1] != b"\x15":  # the next field, a 32-bit integer
            return int(chunk.total_uncompressed_size)
        number, at = _varint(head, at + 1)
        numbers.append(number >> 1)  # zigzag; none is negative
    return numbers[1]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    for byte in data[at : at + 5]:
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return number, at


def _parts(batch: Any) -> Iterator[Any]:
    """Yield a batch in parts with few values and bytes, or single rows."""
    values = sum(_count_values(column) for column in batch.columns)
    if batch.num_rows > 1 and (values > MAX_LINE_VALUES or batch.nbytes > _BATCH_BYTES):
        half = batch.num_rows // 2
        yield from _parts(batch.slice(0, half))
        yield from _parts(batch.slice(half))
    else:
        yield batch


def _count_values(array: Any) -> int:
    """Return the number of values in a column of a batch, including those in lists and structs."""
    import pyarrow.types as types

    kind = array.type
    if types.is_struct(kind):
        return len(array) + sum(_count_values(array.field(index)) for index in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return len(array) + _count_values(array.flatten())
    return len(array)


def _records(part: Any, number: int) -> list[Record | PlainText | Bad]:
    if part.num_rows == 1:
        if (values := sum(_count_values(column) for column in part.columns)) > MAX_LINE_VALUES:
            return [Bad(number, f"has {values:,} values, {MAX_LINE_VALUES:,} are the most. Split the record")]
        if part.nbytes > items.MAX_RECORD_BYTES:
            most = items.MAX_RECORD_BYTES
            return [Bad(number, f"has {part.nbytes:,} bytes, {most:,} are the most. Split the record")]
    try:
        return [Record(place, value) for place, value in enumerate(part.to_pylist(), number)]
    except UnicodeDecodeError as error:
        end = number + part.num_rows - 1
        rows = f"rows {number:,} to {end:,}" if end > number else f"row {number:,}"
        raise FileProblem(f"a text in {rows} is not UTF-8. Write it as UTF-8") from error
