from pathlib import Path

import pytest

from mlxflow.data.records import Record, Shape, read_file
from mlxflow.messages.errors import SourceError
from tests.data.test_records import KEYS, _form, _problem, _read, _write


def test_each_row_of_a_parquet_file_is_a_record(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(3000)]
    parquet.write_table(pyarrow.table({"id": range(3000), "text": texts}), path, row_group_size=700)
    assert _read(path) == [Record(i + 1, {"text": text}) for i, text in enumerate(texts)]
    keys = frozenset({"body"})
    assert _problem(path, keys=keys) == 'has no column "body"; its columns: id, text. Name one in text_key'
    assert _problem(_write(tmp_path, "b.parquet", b"PAR1 and no more")).startswith("is no valid parquet file (")
    with pytest.raises(SourceError, match=r"a\.parquet: changed while it was read\. Run the stage again\.$"):
        list(
            read_file(path, Shape.of(path), expected_digest="0", form=_form(KEYS), strict=True, on_read=lambda _: None)
        )


def test_a_parquet_text_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    texts = pyarrow.array([b"a", b"\xff"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), texts.buffers())
    parquet.write_table(pyarrow.table({"text": texts}), path)
    assert _problem(path) == "a text in rows 1 to 2 is not UTF-8. Write it as UTF-8"
