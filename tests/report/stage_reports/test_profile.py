from pathlib import Path

import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.report.stage_reports.profile import ProfileReport
from mlxflow.storage import report_structs
from mlxflow.storage.report_files import read_report


def test_a_figure_of_the_wrong_type_is_named_by_its_key(built: Path) -> None:
    table = read_report(built / "artifacts/profile/report.toml")
    assert (
        report_structs.parse(table, ProfileReport, shown="report.toml", advice="").figures.median_step_seconds
        == table["median_step_seconds"]
    )
    with pytest.raises(ArtifactError) as caught:
        report_structs.parse(
            table | {"median_step_seconds": -1.0},
            ProfileReport,
            shown="report.toml",
            advice="Run: mlxflow build profile",
        )
    assert str(caught.value) == "report.toml: median_step_seconds: expected `float` >= 0.0. Run: mlxflow build profile"
