"""Sources that ask for far more memory than their size: each is read in bounded memory, or refused in a line."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import xxhash

from mlxflow.data import decompression, items, long_lines, parquet_files
from mlxflow.data.decompression import FileProblem
from mlxflow.data.documents import Document, Formatter
from mlxflow.data.records import Bad, Shape, read_file
from mlxflow.storage.digests import digest_file

# What is advised on a record without any known key
_NAME_KEYS = 'Name its keys "messages", "prompt" and "completion", or "text", or set text_key'


def _documents(path: Path, *, format_: Any = "auto") -> Iterator[Document | Bad]:
    formatter = Formatter(format_=format_, text_key="text", template=None, train_on="all")
    batches = read_file(
        path,
        Shape.of(path),
        expected_digest=digest_file(path).content,
        form=formatter.record_form,
        strict=False,
        on_read=lambda _: None,
    )
    for batch in batches:
        yield from formatter.documents(batch)


def _reasons(path: Path) -> list[tuple[int, str]]:
    return [(one.place, one.reason) for one in _documents(path) if isinstance(one, Bad)]


def _problem(path: Path) -> str:
    with pytest.raises(FileProblem) as caught:
        for _ in _documents(path):
            pass
    return str(caught.value)


@contextmanager
def _at_most(size: int) -> Iterator[None]:
    """Fail if Python's objects take more bytes at any moment of the block."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= size, f"{peak:,} bytes, {size:,} are the most"


def _write(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# --- long lines


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text is one of 300 bytes, read in pieces of 100; a long line one of 200."""
    monkeypatch.setattr(decompression, "PIECE_BYTES", 100)
    for module in ("mlxflow.data.documents", "mlxflow.data.items"):
        monkeypatch.setattr(f"{module}.LONG_TEXT_BYTES", 300)
    for module in ("mlxflow.data.json_records", "mlxflow.data.long_lines"):
        monkeypatch.setattr(f"{module}.LONG_LINE_BYTES", 200)


TEXTS = [
    "some words and a line\n" * 40,
    "x" * 1000,
    "é" * 500,
    "🙂" * 300,
    "\\" * 999,
    '"\\\n\t\x00\x01' * 150,
    "\U0001f469\u200d\U0001f469 \ufeff" * 90,
    " " * 700,
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.usefixtures("small")
def test_a_long_text_of_a_line_comes_in_the_pieces_of_the_text(tmp_path: Path, text: str, ascii_only: bool) -> None:
    line = json.dumps({"id": 1, "text": text, "more": [1, {"a": None}]}, ensure_ascii=ascii_only)
    lines = _write(tmp_path, "a.jsonl", f'{{"text": "before"}}\n{line}\n{{"text": "after"}}\n')
    whole = _write(tmp_path, "a.json", f'[{{"text": "before"}}, {line}, {{"text": "after"}}]')
    found = list(_documents(lines))
    assert [one._replace(place=0) for one in found] == [one._replace(place=0) for one in _documents(whole)]
    pieces = [one for one in found if isinstance(one, Document)][1:-1]
    assert "".join(one.text for one in pieces) == text
    assert len(pieces) > 2
    assert [one.begins for one in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [one.ends for one in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].digest == xxhash.xxh3_128_digest(text.encode())
    assert {one.place for one in pieces} == {2}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "%s\xff"}' % (b"x" * 900), "not valid JSON (byte 901 of its text is not UTF-8). Fix the record"),
        (b'{"text": "%s"' % (b"x" * 900), "not valid JSON (Input data was truncated). Fix the line"),
        (b'{"text": "%s", "a": NaN}' % (b"x" * 900), "not valid JSON (invalid character (byte 918)). Fix the line"),
        (b'{"text": "%s", "a": %s}' % (b"x" * 900, b"[" * 10_000), "not valid JSON (nested too deeply). Fix the line"),
        (b'["%s"]' % (b"x" * 900), "expected an object. Fix the record"),
        (
            b'{"more": "%s"}' % (b"x" * 900),
            'has no "text". ' + _NAME_KEYS,
        ),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_long_line_that_cannot_be_used_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = _write(tmp_path, "a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "three"}')
    assert _reasons(path) == [(2, reason)]
    assert [one.text for one in _documents(path) if isinstance(one, Document)] == ["one", "three"]


def test_reading_a_line_of_8_mb_takes_at_most_4_times_its_size_in_memory(tmp_path: Path) -> None:
    text = "the quick brown fox " * 400_000 + "🙂"  # as a str it is 4 bytes a character
    path = _write(tmp_path, "a.jsonl", json.dumps({"text": text}, ensure_ascii=False))
    size = len(text)
    del text
    with _at_most(4 * path.stat().st_size):
        assert sum(len(one.text) for one in _documents(path) if isinstance(one, Document)) == size


@pytest.mark.parametrize("values", ["{}", "[]", '"a"', "0", '{"a":0}'])
def test_a_line_of_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str) -> None:
    monkeypatch.setattr(long_lines, "MAX_LINE_VALUES", 1 << 14)
    most = "16,384"
    known = _write(tmp_path, "a.jsonl", f'{{"messages": [{",".join([values] * 600_000)}]}}')
    other = _write(tmp_path, "b.jsonl", f'{{"text": "a", "other": [{",".join([values] * 600_000)}]}}')
    with _at_most(5 * known.stat().st_size):
        assert _reasons(known) == [(1, f"has over {most} values. Split the record")]
    with _at_most(4 * other.stat().st_size):
        assert [one.text for one in _documents(other) if isinstance(one, Document)] == ["a"]


def test_commas_and_quotes_in_a_long_text_do_not_count_as_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_lines, "MAX_LINE_VALUES", 100)
    path = _write(tmp_path, "a.jsonl", json.dumps({"text": '{"a": [1, "\\\\", {' * 80_000}))
    assert path.stat().st_size > long_lines.LONG_LINE_BYTES
    assert _reasons(path) == []


def test_many_unused_keys_of_a_record_take_bounded_memory(tmp_path: Path) -> None:
    keys = ",".join(f'"k{number}":{number}' for number in range(300_000))
    path = _write(tmp_path, "a.jsonl", f'{{{keys},"text":"a"}}\n')
    with _at_most(4 * path.stat().st_size):
        assert [one.text for one in _documents(path) if isinstance(one, Document)] == ["a"]


def test_a_conversation_of_many_megabytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "MAX_CONVERSATION_BYTES", 1 << 20)
    monkeypatch.setattr("mlxflow.data.documents.MAX_CONVERSATION_BYTES", 1 << 20)
    talk = {"prompt": "x", "completion": "y" * (1 << 21)}
    lines = _write(tmp_path, "a.jsonl", json.dumps(talk))
    assert _reasons(lines) == [(1, "holds a conversation of over 1,048,576 bytes. Split the record")]
    whole = _write(tmp_path, "a.json", json.dumps([talk]))
    assert _reasons(whole) == [(1, "holds a conversation of 2,097,153 bytes, 1,048,576 are the most. Split the record")]


def test_a_json_file_of_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxflow.data.json_records._MAX_FILE_VALUES", 100_000)
    records = ",".join(['{"text":"a"}'] * 100_000)
    path = _write(tmp_path, "a.json", f"[{records}]")
    assert _problem(path) == "is a JSON file that has over 100,000 values. Write its records as .jsonl"


# --- what a record holds is never shown at length


DEEP = "[" * 50_000


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"messages": [{"role": "r " * 10**6, "content": "x"}]},
            f"message 1: role '{'r ' * 50}' ...: expected a name such as user or assistant. Fix the record",
        ),
        (
            {"messages": [{"role": "r" * 10**6, "content": "x"}]},
            f"message 1: role '{'r' * 100}' ...: expected a name such as user or assistant. Fix the record",
        ),
        (
            {"k" * 10**6: 1},
            f'has no "text" (it has {"k" * 40} ...). ' + _NAME_KEYS,
        ),
        (
            {"\x1b]0;x\x07": 1},
            'has no "text" (it has \\x1b]0;x\\x07). ' + _NAME_KEYS,
        ),
        ({"messages": DEEP}, 'its "messages" are not valid JSON (nested too deeply). Fix the record'),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": DEEP}]}]},
            "message 1: call 1: its arguments are not valid JSON (nested too deeply). Fix the record",
        ),
        (
            {"conversations": [{"from": "function_call", "value": DEEP}]},
            "message 1: its call is not valid JSON (nested too deeply). Fix the record",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "tools": "[" + "9" * 5000 + "]"},
            'its "tools" are not valid JSON (a number has too many digits). Fix the record',
        ),
        ({"instruction": "x", "output": "y", "history": 5}, '"history" is no list of pairs of texts. Fix the record'),
        ({"text": "\ud800"}, "character 0 is half of a surrogate pair. Fix the record"),
        (
            {"\ud800": 1},
            'has no "text" (it has \\ud800). ' + _NAME_KEYS,
        ),
    ],
)
def test_a_hostile_record_is_one_short_line(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    assert _reasons(_write(tmp_path, "a.jsonl", json.dumps(record))) == [(1, reason)]


# --- tables


def test_a_header_of_many_columns_costs_nothing_for_each_row(tmp_path: Path) -> None:
    header = ",".join(["text", *(f"c{number}" for number in range(30_000))])
    path = _write(tmp_path, "a.csv", header + "\n" + "x\n" * 10_000)
    with _at_most(20_000_000):
        assert sum(1 for _ in _documents(path)) == 10_000


def _table(path: Path, column: Any, **options: Any) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": column}), path, **options)
    return path


def _repeated(value: str, count: int) -> Any:
    import pyarrow

    indices = pyarrow.array(memoryview(bytes(4 * count)).cast("i"), pyarrow.int32())
    return pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([value]))


def _one_value() -> Any:
    import pyarrow

    return pyarrow.array(["hello world " * 7_000_000])


@pytest.mark.parametrize(
    ("column", "options"),
    [
        (lambda: _repeated("hello world " * 100_000, 8192), {}),
        (lambda: _repeated("hello world " * 100_000, 8192), {"store_schema": False}),
        (lambda: _repeated("a", 20_000_000), {"row_group_size": 20_000_000}),
        (_one_value, {"compression": "zstd"}),
    ],
)
def test_a_parquet_file_that_expands_to_a_large_multiple_is_refused(
    tmp_path: Path, column: Callable[[], Any], options: dict[str, Any]
) -> None:
    import pyarrow

    path = _table(tmp_path / "a.parquet", column(), **options)
    said = _problem(path)
    assert said.startswith("inflates to over 400 times its size (")
    assert said.endswith(" bytes and no end). Unpack it and check it")
    assert pyarrow.total_allocated_bytes() < 100_000_000


def test_a_large_value_of_a_dictionary_is_decoded_for_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_files, "_BATCH_BYTES", 1 << 16)
    path = _table(tmp_path / "a.parquet", _repeated("x" * 10_000, 50), store_schema=False)
    formatter = Formatter(format_="text", text_key="text", template=None, train_on="all")
    sizes = [len(batch) for batch in parquet_files.read_parquet(path, formatter.record_form)]
    assert sum(sizes) == 50
    assert max(sizes) <= 6


def test_a_row_of_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow

    monkeypatch.setattr(parquet_files, "MAX_LINE_VALUES", 1000)
    column = pyarrow.array([["a"], ["a"] * 5000, ["a"]])
    path = _table(tmp_path / "a.parquet", column)
    assert [reason for _, reason in _reasons(path)] == [
        '"text" is a list: expected text. Fix the record',
        "has 5,001 values, 1,000 are the most. Split the record",
        '"text" is a list: expected text. Fix the record',
    ]
