from pathlib import Path

from mlxflow.report.stage_reports.benchmark import BenchmarkReport
from mlxflow.storage import report_structs


def test_reading_and_writing_a_report_changes_nothing(built: Path, tmp_path: Path) -> None:
    file = built / "artifacts/benchmark/report.toml"
    report = report_structs.read(file, BenchmarkReport, advice="")
    assert len(report.figures.training) > 4
    report_structs.write(tmp_path / "report.toml", report)
    assert (tmp_path / "report.toml").read_bytes() == file.read_bytes()
