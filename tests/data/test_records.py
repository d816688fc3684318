"""Reading files of every kind, whatever the size of the pieces they are read in."""

import csv
import gzip
import io
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard

from mlxflow.data import decompression, items
from mlxflow.data.decompression import FileProblem, read_pieces
from mlxflow.data.records import Bad, Binary, PlainText, Record, RecordForm, Shape, read_file
from mlxflow.errors import SourceError
from mlxflow.storage.digests import digest_file

KEYS = frozenset({"text"})


def _read(path: Path, *, strict: bool = True, keys: frozenset[str] = KEYS) -> list[Record | PlainText | Bad]:
    batches = read_file(
        path,
        Shape.of(path),
        expected_digest=digest_file(path).content,
        form=_form(keys),
        strict=strict,
        on_read=lambda _: None,
    )
    return [item for batch in batches for item in batch]


def _form(keys: frozenset[str]) -> RecordForm:
    """Return a form whose records are objects with one of the keys."""
    return RecordForm(keys, frozenset(), lambda value: isinstance(value, dict) and bool(keys & value.keys()), dict)


def _problem(path: Path, *, strict: bool = True, keys: frozenset[str] = KEYS) -> str:
    with pytest.raises(FileProblem) as caught:
        _read(path, strict=strict, keys=keys)
    return str(caught.value)


def _write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(decompression, "PIECE_BYTES", size)


@pytest.mark.parametrize(
    ("name", "kind", "compression"),
    [
        ("a.txt", "text", ""),
        ("A.JSONL", "jsonl", ""),
        ("a.ndjson.gz", "jsonl", "gz"),
        ("a.b.csv.zst", "csv", "zst"),
        ("a.json", "json", ""),
        ("a.parquet", "parquet", ""),
        ("a.parquet.gz", "text", "gz"),
        ("notes.gz", "text", "gz"),
        ("Makefile", "text", ""),
        ("v1.2", "text", ""),
    ],
)
def test_a_name_promises_how_a_file_is_read(name: str, kind: str, compression: str) -> None:
    assert Shape.of(Path(name)) == (kind, compression)


# --- bytes


def _compress(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])
    if name.endswith(".zst"):
        compressor = zstandard.ZstdCompressor()
        return compressor.compress(data[: len(data) // 2]) + compressor.compress(data[len(data) // 2 :])
    return data


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("size", [7, 100, 1 << 20])
def test_the_bytes_come_back_in_any_pieces_and_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    _pieces(monkeypatch, size)
    data = random.Random(0).randbytes(5000)
    path = _write(tmp_path, name, _compress(name, data))
    counted: list[int] = []
    pieces = read_pieces(
        path,
        compression=Shape.of(path).compression,
        expected_digest=digest_file(path).content,
        on_read=counted.append,
    )
    assert b"".join(pieces) == data
    assert sum(counted) == path.stat().st_size


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.zst"])
def test_a_file_that_is_not_what_its_digest_says_is_told(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path, name, _compress(name, b'{"text": "a"}\n' * 50))
    with pytest.raises(SourceError) as caught:
        list(
            read_pieces(path, compression=Shape.of(path).compression, expected_digest="0" * 32, on_read=lambda _: None)
        )
    assert str(caught.value) == f"{path}: changed while it was read. Run the stage again."


def test_a_file_that_vanishes_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        list(read_pieces(tmp_path / "a", compression="", expected_digest="", on_read=lambda _: None))
    assert str(caught.value) == f"{tmp_path / 'a'}: vanished before it was read. Run the stage again."


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_what_inflates_without_end_is_told_before_it_fills_the_memory(tmp_path: Path, name: str) -> None:
    data = bytes(300_000_000)
    path = _write(tmp_path, name, gzip.compress(data, 9) if name.endswith("gz") else zstandard.compress(data))
    del data
    tracemalloc.start()
    try:
        with pytest.raises(FileProblem, match=r"^inflates to over 400 times its size \([\d,]+ bytes and no end\)"):
            for _ in read_pieces(
                path,
                compression=Shape.of(path).compression,
                expected_digest=digest_file(path).content,
                on_read=lambda _: None,
            ):
                pass
        assert tracemalloc.get_traced_memory()[1] < 150_000_000
    finally:
        tracemalloc.stop()


# --- text


@pytest.mark.parametrize("size", [8, 13, 64, 4096])
@pytest.mark.parametrize(
    "text",
    [
        "one line\nand another\n" * 20,
        "no line at all " * 20,
        "é🙂" * 50,
        "x" * 64,
        "x" * 63 + "\n",
        "first\r\nsecond\r\n" * 8,
    ],
)
def test_a_text_comes_in_pieces_that_are_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, size: int
) -> None:
    _pieces(monkeypatch, size)
    found = [item for item in _read(_write(tmp_path, "a.txt", text.encode())) if isinstance(item, PlainText)]
    assert "".join(item.text for item in found) == text
    assert [item.begins for item in found] == [True] + [False] * (len(found) - 1)
    assert [item.ends for item in found] == [False] * (len(found) - 1) + [True]
    if "\n" in text and size == 64:
        assert all(item.text.endswith("\n") for item in found[:-1])


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
        assert _read(_write(tmp_path, name, b""), strict=False) == []


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    assert _read(_write(tmp_path, "a.txt", mark + b"text")) == [PlainText("text", True, True)]
    assert _read(_write(tmp_path, "a.jsonl", mark + b'{"text": "a"}')) == [Record(1, {"text": "a"})]
    assert _read(_write(tmp_path, "a.json", mark + b'{"text": "a"}')) == [Record(1, {"text": "a"})]
    assert _read(_write(tmp_path, "a.csv", mark + b"text\na\n")) == [Record(2, {"text": "a"})]


@pytest.mark.parametrize("size", [64, 4096])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("at", [0, 5, 63, 64, 150])
def test_a_byte_that_is_not_utf_8_is_told_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, mark: bytes, size: int
) -> None:
    _pieces(monkeypatch, size)
    data = mark + b"abcdefg\n" * 30
    path = _write(tmp_path, "a.txt", data[: len(mark) + at] + b"\xff" + data[len(mark) + at + 1 :])
    assert _problem(path) == f"byte {len(mark) + at:,} is not UTF-8. Save the file as UTF-8"


def test_a_nul_near_the_beginning_means_that_a_file_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Binary, match=r"^byte 3 is NUL: no text\. Leave the file out$"):
        _read(_write(tmp_path, "a.txt", b"abc\0def"))
    _pieces(monkeypatch, 1 << 14)
    with pytest.raises(FileProblem, match=r"^byte 40,000 is NUL\. Remove it$") as caught:
        _read(_write(tmp_path, "a.txt", b"a" * 40_000 + b"\0"))
    assert not isinstance(caught.value, Binary)


# --- lines of JSON


@pytest.mark.parametrize("seed", range(10))
def test_lines_are_what_the_json_library_says_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    generator = random.Random(seed)
    _pieces(monkeypatch, generator.choice([5, 17, 60, 1000]))
    lines = []
    for _ in range(40):
        value = {"text": "é🙂\n" * generator.randrange(6), "n": generator.random()}
        lines.append(generator.choice([json.dumps(value), json.dumps(value, ensure_ascii=False), "", "  ", "{", "\r"]))
    path = _write(tmp_path, "a.jsonl", "\n".join(lines).encode() + b"\n" * generator.randrange(2))
    found = _read(path)
    expected: list[tuple[int, Any]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                expected.append((number, json.loads(line)))
            except ValueError:
                expected.append((number, None))
    assert [
        (i.place, i.value if isinstance(i, Record) else None) for i in found if not isinstance(i, PlainText)
    ] == expected


@pytest.mark.parametrize("where", ["beginning", "middle", "end", "last line"])
@pytest.mark.parametrize("size", [16, 64, 5000])
def test_a_line_that_is_too_long_is_told_and_its_neighbours_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, size: int
) -> None:
    _pieces(monkeypatch, size)
    monkeypatch.setattr(items, "MAX_RECORD_BYTES", 300)
    long = b'{"text": "' + b"x" * 1000 + b'"}\n'
    short = [b'{"text": "%d"}\n' % i for i in range(6)]
    at = {"beginning": 0, "middle": 3, "end": 6, "last line": 6}[where]
    data = b"".join([*short[:at], long, *short[at:]])
    found = _read(_write(tmp_path, "a.jsonl", data.removesuffix(b"\n") if where == "last line" else data))
    assert [item.value["text"] for item in found if isinstance(item, Record)] == [str(i) for i in range(6)]
    bad = [item for item in found if isinstance(item, Bad)]
    assert [item.place for item in bad] == [at + 1]
    assert bad[0].reason.endswith("300 are the most. Split the record")
    assert {item.place for item in found if not isinstance(item, PlainText)} == set(range(1, 8))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "two"', "not valid JSON (Expecting ',' delimiter at column 15). Fix the line"),
        (b'{"text": "\xff"}', "not valid JSON (byte 10 is not UTF-8). Fix the line"),
        (b"[" * 100_000, "not valid JSON (nested too deeply). Fix the line"),
        (b'{"text": "a\0"}', "not valid JSON (Invalid control character at column 12). Fix the line"),
    ],
)
def test_a_line_that_is_no_json_is_told(tmp_path: Path, line: bytes, reason: str) -> None:
    assert _read(_write(tmp_path, "a.jsonl", b'{"text": "one"}\n\n' + line)) == [
        Record(1, {"text": "one"}),
        Bad(3, reason),
    ]


def test_numbers_that_are_none_are_no_fault(tmp_path: Path) -> None:
    found = _read(_write(tmp_path, "a.jsonl", b'{"text": "a", "score": NaN}'))
    assert isinstance(found[0], Record)
    assert found[0].value["text"] == "a"


# --- whole files of JSON, tables


def test_a_json_file_holds_records_or_one_or_is_a_text(tmp_path: Path) -> None:
    several = _write(tmp_path, "a.json", b'[{"text": "a"}, {"other": 1}]')
    assert _read(several) == [Record(1, {"text": "a"}), Record(2, {"other": 1})]
    assert _read(_write(tmp_path, "b.json", b'{"text": "a"}')) == [Record(1, {"text": "a"})]
    package = _write(tmp_path, "package.json", b'{"name": "x"}')
    assert _read(package, strict=False) == [PlainText('{"name": "x"}', True, True)]
    assert _problem(package) == 'expected a list of objects with "text". Change the file or its format'


def test_a_json_file_that_is_broken_or_too_large_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, "a.json", b'[{"text": "a"},\n {"text" "b"}]')
    assert _problem(path) == "not valid JSON (Expecting ':' delimiter at line 2 column 10). Fix the file"
    monkeypatch.setattr(items, "MAX_RECORD_BYTES", 10)
    assert _problem(path) == "is a JSON file of over 10 bytes. Write its records as .jsonl"


@pytest.mark.parametrize("size", [9, 50, 4096])
def test_a_table_gives_a_record_a_row_with_the_line_it_begins_on(
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


def test_a_table_without_the_column_is_a_text_or_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_parquet_file_gives_a_record_a_row(tmp_path: Path) -> None:
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


def test_a_row_wider_than_its_header_is_told_and_a_blank_one_is_none(tmp_path: Path) -> None:
    wide = "has 3 fields, the header 2. Quote a field with commas in it"
    assert _read(_write(tmp_path, "a.csv", b"text,id\na,1\n\nb, and more,2\nc,3,\n")) == [
        Record(2, {"text": "a"}),
        Bad(4, wide),
        Record(5, {"text": "c"}),
    ]
    quoted = _write(tmp_path, "b.csv", b'"a\nname",text\n1,x\n')
    assert _read(quoted) == [Record(3, {"text": "x"})]


def test_utf_16_is_told_and_never_guessed(tmp_path: Path) -> None:
    for name, text in (("a.txt", "a text"), ("a.jsonl", '{"text": "NaN"}\n'), ("a.json", "[1]"), ("a.csv", "text\na")):
        for codec in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
            said = _problem(_write(tmp_path, name, text.encode(codec)))
            assert said == f"is {codec[:6].upper()}, not UTF-8. Save the file as UTF-8", (name, codec)


def test_small_whole_numbers_are_binary_and_no_utf_16(tmp_path: Path) -> None:
    with pytest.raises(Binary):
        _read(_write(tmp_path, "a.txt", bytes([1, 0, 2, 0, 3, 0, 4, 0])))


def test_a_parquet_text_that_is_no_utf_8_is_told(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    texts = pyarrow.array([b"a", b"\xff"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), texts.buffers())
    parquet.write_table(pyarrow.table({"text": texts}), path)
    assert _problem(path) == "a text in rows 1 to 2 is not UTF-8. Write it as UTF-8"
