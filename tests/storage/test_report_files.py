from pathlib import Path

import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.storage import report_files


def test_read_report_returns_what_was_written(tmp_path: Path) -> None:
    report = {"loss": 1.5, "run": {"seconds": 3}, "models": [{"name": "a"}]}
    report_files.write_report(tmp_path / "report.toml", report)
    assert report_files.read_report(tmp_path / "report.toml") == report


def test_a_missing_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        report_files.read_report(tmp_path / "report.toml")
    assert str(caught.value) == f"{tmp_path / 'report.toml'}: missing. Build it again."
