from pathlib import Path

import pytest

from mlxflow.data import items
from mlxflow.data.records import Bad, PlainText, Record
from tests.data.test_records import _pieces, _read, _write


@pytest.mark.parametrize("where", ["beginning", "middle", "end", "last line"])
@pytest.mark.parametrize("size", [16, 64, 5000])
def test_a_too_long_line_is_named_and_its_neighbours_are_read(
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
