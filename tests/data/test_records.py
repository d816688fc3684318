"""Reading files of every kind, whatever the size of the pieces they are read in."""

import gzip
import random
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from mlxflow.data import decompression
from mlxflow.data.decompression import FileProblem, read_pieces
from mlxflow.data.records import Bad, PlainText, Record, RecordForm, Shape, read_file
from mlxflow.messages.errors import SourceError
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
def test_a_file_name_decides_how_the_file_is_read(name: str, kind: str, compression: str) -> None:
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
def test_decompression_is_exact_for_any_chunk_size_and_number_of_members(
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
def test_a_file_that_does_not_match_its_digest_is_an_error(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path, name, _compress(name, b'{"text": "a"}\n' * 50))
    with pytest.raises(SourceError) as caught:
        list(
            read_pieces(path, compression=Shape.of(path).compression, expected_digest="0" * 32, on_read=lambda _: None)
        )
    assert str(caught.value) == f"{path}: changed while it was read. Run the stage again."


def test_a_file_that_vanishes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        list(read_pieces(tmp_path / "a", compression="", expected_digest="", on_read=lambda _: None))
    assert str(caught.value) == f"{tmp_path / 'a'}: vanished before it was read. Run the stage again."


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_a_decompression_bomb_is_an_error_before_it_fills_memory(tmp_path: Path, name: str) -> None:
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


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.json", "a.csv"):
        assert _read(_write(tmp_path, name, b""), strict=False) == []


# --- lines of JSON


# --- whole files of JSON, tables
