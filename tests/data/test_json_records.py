import json
import random
from pathlib import Path
from typing import Any

import pytest

from mlxflow.data import items
from mlxflow.data.records import Bad, PlainText, Record
from tests.data.test_records import _pieces, _problem, _read, _write


@pytest.mark.parametrize("seed", range(10))
def test_lines_are_parsed_as_the_json_library_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
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


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "two"', "not valid JSON (Expecting ',' delimiter at column 15). Fix the line"),
        (b'{"text": "\xff"}', "not valid JSON (byte 10 is not UTF-8). Fix the line"),
        (b"[" * 100_000, "not valid JSON (nested too deeply). Fix the line"),
        (b'{"text": "a\0"}', "not valid JSON (Invalid control character at column 12). Fix the line"),
    ],
)
def test_a_line_that_is_no_json_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    assert _read(_write(tmp_path, "a.jsonl", b'{"text": "one"}\n\n' + line)) == [
        Record(1, {"text": "one"}),
        Bad(3, reason),
    ]


def test_nan_and_infinity_are_accepted(tmp_path: Path) -> None:
    found = _read(_write(tmp_path, "a.jsonl", b'{"text": "a", "score": NaN}'))
    assert isinstance(found[0], Record)
    assert found[0].value["text"] == "a"


def test_a_json_file_holds_a_list_of_records_one_record_or_a_text(tmp_path: Path) -> None:
    several = _write(tmp_path, "a.json", b'[{"text": "a"}, {"other": 1}]')
    assert _read(several) == [Record(1, {"text": "a"}), Record(2, {"other": 1})]
    assert _read(_write(tmp_path, "b.json", b'{"text": "a"}')) == [Record(1, {"text": "a"})]
    package = _write(tmp_path, "package.json", b'{"name": "x"}')
    assert _read(package, strict=False) == [PlainText('{"name": "x"}', True, True)]
    assert _problem(package) == 'expected a list of objects with "text". Change the file or its format'


def test_a_broken_or_too_large_json_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, "a.json", b'[{"text": "a"},\n {"text" "b"}]')
    assert _problem(path) == "not valid JSON (Expecting ':' delimiter at line 2 column 10). Fix the file"
    monkeypatch.setattr(items, "MAX_RECORD_BYTES", 10)
    assert _problem(path) == "is a JSON file of over 10 bytes. Write its records as .jsonl"
