from pathlib import Path

import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.report.stage_reports.quantize import QuantizeReport
from mlxflow.storage import report_structs
from mlxflow.storage.report_files import read_report


def test_a_figure_of_the_wrong_type_is_named_by_its_key(built: Path) -> None:
    table = read_report(built / "artifacts/quantize/q4/report.toml")
    assert report_structs.parse(table, QuantizeReport, shown="report.toml", advice="").figures.bits == table["bits"]
    with pytest.raises(ArtifactError) as caught:
        report_structs.parse(
            table | {"bits": "4"}, QuantizeReport, shown="report.toml", advice="Run: mlxflow build quantize"
        )
    assert str(caught.value) == "report.toml: bits: expected `int`, got `str`. Run: mlxflow build quantize"
