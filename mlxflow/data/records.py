"""Read the records of a source file: lines of JSON, rows of a table, or one text.

An unusable record is yielded as `Bad`; a file that cannot be used raises `FileProblem`. Both have position and
reason; the caller decides what to do.
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
from mlxflow.messages.errors import SourceError
from mlxflow.storage.digests import digest_file
from mlxflow.storage.paths import printable

#: The kind of file by its last suffix that is no compression; any other file is text.
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Shape(NamedTuple):
    """How a file is read; part of the cache key of its shard.

    Attributes:
        kind: "text", "jsonl", "json", "csv" or "parquet".
        compression: "", "gz" or "zst".
    """

    kind: str
    compression: str

    @classmethod
    def of(cls, path: Path) -> "Shape":
        """Return the shape that follows from a file's name."""
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
        expected_digest: xxh3-128 of its bytes; if it differs, the file changed meanwhile.
        form: of its records.
        strict: a .json or .csv file without records is an error; else it is read as a text.
        on_read: called with the number of bytes of each read.
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
            after = path.stat()  # restoring the content afterwards does not help: other content was read
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
