import json
from pathlib import Path

import pytest

from mlxflow.workflow.journal import parse, read_records

RECORD = {"settings": {}, "inputs": {}, "outputs": {"artifacts/s/a": [1, "0f"]}, "seconds": 1.0}


def _line(task: str, record: object) -> bytes:
    return json.dumps({"task": task, "record": record}).encode() + b"\n"


def test_the_last_valid_line_of_a_task_counts() -> None:
    newer = {**RECORD, "seconds": 2.0}
    contents = parse(_line("a", {"_values_:": RECORD}) + _line("b", None) + _line("a", {"_values_:": newer}))
    assert contents == ({"a": {"_values_:": newer}}, 3, False, {})


def test_a_dropped_record_is_not_read() -> None:
    assert parse(_line("a", {"_values_:": RECORD}) + _line("a", None)).entries == {}


def test_a_torn_last_line_is_no_damage_but_any_other_torn_line_is() -> None:
    whole = _line("a", {"_values_:": RECORD})
    torn = parse(whole + whole[:20])
    assert (list(torn.entries), torn.is_torn, torn.damage) == (["a"], True, {})
    assert list(parse(whole[:20] + b"\n" + whole).damage) == ["line 1"]


def test_an_invalid_record_is_damage_of_its_task() -> None:
    contents = parse(_line("a", {"_values_:": {**RECORD, "seconds": "long"}}))
    assert contents.entries == {}
    assert contents.damage == {"the record of a": "seconds: expected a number of seconds"}


def test_records_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state.jsonl"
    assert read_records(path) == {}
    path.write_bytes(_line("a", {"_values_:": RECORD}) + _line("b", {"ignore:": "1"}))
    assert read_records(path) == {"a": RECORD}
    path.unlink()
    path.mkdir()
    assert read_records(path) == {}
    expected = f"{path}: not valid state (no regular file). Every stage is judged by its own report.\n"
    assert capsys.readouterr().err == expected
