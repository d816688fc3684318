from pathlib import Path

import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.report.stage_reports.pretokenize import PretokenizeReport
from mlxflow.storage import report_structs
from mlxflow.storage.report_files import read_report


def test_a_figure_of_the_wrong_type_is_named_by_its_key(built: Path) -> None:
    table = read_report(built / "artifacts/pretokenize/report.toml")
    assert (
        report_structs.parse(table, PretokenizeReport, shown="report.toml", advice="").figures.packing
        == table["packing"]
    )
    with pytest.raises(ArtifactError) as caught:
        report_structs.parse(
            table | {"packing": 3}, PretokenizeReport, shown="report.toml", advice="Run: mlxflow build pretokenize"
        )
    assert str(caught.value) == "report.toml: packing: expected `str`, got `int`. Run: mlxflow build pretokenize"
