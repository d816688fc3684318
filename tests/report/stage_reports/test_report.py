from pathlib import Path

import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.report.stage_reports.report import PageReport
from mlxflow.storage import report_structs
from mlxflow.storage.report_files import read_report


def test_a_figure_of_the_wrong_type_is_named_by_its_key(built: Path) -> None:
    table = read_report(built / "artifacts/report/report.toml")
    assert (
        report_structs.parse(table, PageReport, shown="report.toml", advice="").figures.page_bytes
        == table["page_bytes"]
    )
    with pytest.raises(ArtifactError) as caught:
        report_structs.parse(
            table | {"page_bytes": 1.5}, PageReport, shown="report.toml", advice="Run: mlxflow build report"
        )
    assert str(caught.value) == "report.toml: page_bytes: expected `int`, got `float`. Run: mlxflow build report"
