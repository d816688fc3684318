import csv
import io
from pathlib import Path

import pytest

from mlxflow.data import items
from mlxflow.data.records import Bad, PlainText, Record
from tests.data.test_records import _pieces, _problem, _read, _write


@pytest.mark.parametrize("size", [9, 50, 4096])
def test_each_row_of_a_table_is_a_record_with_its_first_line_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    _pieces(monkeypatch, size)
    out = io.StringIO()
    csv.writer(out).writerows([["id", "text"], [1, "two\nlines"], [2, 'a "quoted", é'], [3, "last"]])
    found = _read(_write(tmp_path, "a.csv", out.getvalue().encode()))
    assert [(item.place, item.value["text"]) for item in found if isinstance(item, Record)] == [
        (2, "two\nlines"),
        (4, 'a "quoted", é'),
        (5, "last"),
    ]


def test_a_table_without_a_text_column_is_a_text_or_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, "a.csv", b"id,body\n1,a\n")
    assert _read(path, strict=False) == [PlainText("id,body\n1,a\n", True, True)]
    assert _problem(path) == 'has no column "text". Change the file or name its column in text_key'
    assert _read(_write(tmp_path, "b.csv", b"text,id\n,1\nx\n")) == [
        Record(2, {"text": ""}),
        Record(3, {"text": "x"}),
    ]
    monkeypatch.setattr(items, "MAX_RECORD_BYTES", 10)
    assert _problem(_write(tmp_path, "c.csv", b"text\n" + b"x" * 50 + b"\n")) == (
        "line 2: not valid CSV (field larger than field limit (10)). Fix the line"
    )


def test_a_row_wider_than_its_header_is_named_and_a_blank_one_is_skipped(tmp_path: Path) -> None:
    wide = "has 3 fields, the header 2. Quote a field with commas in it"
    assert _read(_write(tmp_path, "a.csv", b"text,id\na,1\n\nb, and more,2\nc,3,\n")) == [
        Record(2, {"text": "a"}),
        Bad(4, wide),
        Record(5, {"text": "c"}),
    ]
    quoted = _write(tmp_path, "b.csv", b'"a\nname",text\n1,x\n')
    assert _read(quoted) == [Record(3, {"text": "x"})]
