from pathlib import Path

import pytest

from mlxflow.quantization import work_records
from mlxflow.quantization.work_records import WorkRecord, read_records, write_records


def test_records_are_read_again_and_damaged_ones_are_none(tmp_path: Path) -> None:
    file = tmp_path / "state" / "rates.json"
    assert read_records(file) == {}
    write_records(file, {"gptq on cpu": [WorkRecord(1.5, 0.5)]})
    assert read_records(file) == {"gptq on cpu": [WorkRecord(1.5, 0.5)]}
    file.write_bytes(file.read_bytes()[:-3])
    assert read_records(file) == {}


def test_records_of_another_format_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rates.json"
    monkeypatch.setattr(work_records, "_FORMAT", 1)
    write_records(file, {"gptq on cpu": [WorkRecord(1.5, 0.5)]})
    monkeypatch.undo()
    assert read_records(file) == {}
