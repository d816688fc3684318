from pathlib import Path

from mlxflow.report.stage_reports.benchmark import BenchmarkReport
from mlxflow.storage import report_structs


def test_a_report_is_written_as_it_was_read(built: Path, tmp_path: Path) -> None:
    file = built / "artifacts/benchmark/report.toml"
    report = report_structs.read(file, BenchmarkReport, advice="")
    assert len(report.figures.training) > 4
    report_structs.write(tmp_path / "report.toml", report)
    assert (tmp_path / "report.toml").read_bytes() == file.read_bytes()
