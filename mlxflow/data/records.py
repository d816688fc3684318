"""From the bytes of a source file to its records: lines of JSON, rows of a table, or one text.

What is wrong with a single record is a `Bad` beside the good ones; what is wrong with the whole file is a
`streams.FileProblem`. Both say where and why; the caller decides what that means.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from mlxflow.data.decompression import THE_SOURCES, naming_errors, read_pieces
from mlxflow.data.items import Bad as Bad
from mlxflow.data.items import PlainText as PlainText
from mlxflow.data.items import Record as Record
from mlxflow.data.items import RecordForm as RecordForm
from mlxflow.data.json_records import read_json, read_lines
from mlxflow.data.parquet_files import read_parquet
from mlxflow.data.tables import read_csv
from mlxflow.data.texts import Binary as Binary
from mlxflow.data.texts import read_text
from mlxflow.errors import SourceError
from mlxflow.storage.digests import digest_file
from mlxflow.storage.paths import printable

#: How files are read, by the last suffix that is no compression; any other file is text.
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Shape(NamedTuple):
    """How a file is read: part of the key of its shard.

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


def read_file(
    path: Path,
    shape: Shape,
    *,
    expected_digest: str,
    form: RecordForm,
    strict: bool,
    on_read: Callable[[int], None],
    source: str = THE_SOURCES,
) -> Iterator[list[Record | PlainText | Bad]]:
    """Yield the records of a file in batches of a few megabytes.

    Args:
        path: the file.
        shape: how it is read.
        expected_digest: xxh3-128 of its bytes; another one means that it changed meanwhile.
        form: of its records; a .json or .csv file without any is a text like any other file ...
        strict: ... unless this is set; then it is a problem.
        on_read: called with each number of bytes read.
        source: the setting that names the file, for messages.

    Raises:
        FileProblem: the file as a whole cannot be used.
        SourceError: it changed, vanished or became unreadable, or a library is missing.
    """
    if shape.kind == "parquet":
        with naming_errors(path, source):
            before = path.stat()
            yield from read_parquet(path, form)
            on_read(before.st_size)
            after = path.stat()  # content that was put back is not what was read
            is_same = (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)
            if not is_same or digest_file(path).content != expected_digest:
                raise SourceError(f"{printable(str(path))}: changed while it was read. Run the stage again.")
        return
    pieces = read_pieces(
        path, compression=shape.compression, expected_digest=expected_digest, on_read=on_read, source=source
    )
    if shape.kind == "jsonl":
        yield from read_lines(pieces, form)
    elif shape.kind == "json":
        yield from read_json(pieces, form, strict=strict)
    elif shape.kind == "csv":
        yield from read_csv(pieces, form, strict=strict)
    else:
        yield from read_text(pieces)
