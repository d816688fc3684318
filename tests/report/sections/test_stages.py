from pathlib import Path

from mlxflow.report.elements import Figure, Note, Table
from mlxflow.report.formatting import UNKNOWN
from mlxflow.report.sections import stages
from tests.report.runs import edit, read


def test_every_stage_has_its_state_time_and_artifact(root: Path) -> None:
    edit(root, "train", lambda report: report["stage"].update(mlxflow="0.0.1"))
    (root / "artifacts/profile/report.toml").unlink()
    (root / "artifacts/quantize/q4/report.toml").write_text("[")
    drawn, *notes, table = stages.section([read(root)]).blocks
    assert isinstance(drawn, Figure)
    assert isinstance(table, Table)
    rows = {row[0]: row for row in table.rows}
    assert rows["pretokenize"][1:6] == ("built", UNKNOWN, "12.5 s", "cpu", "artifacts/pretokenize")
    assert rows["train"][1:3] == ("out of date", "pretokenize")
    assert rows["profile"] == (
        *("profile", "not built", "train, pretokenize", UNKNOWN, UNKNOWN, "artifacts/profile", UNKNOWN),
    )
    assert rows["quantize:q4"][1] == "damaged"
    said = [block.text for block in notes if isinstance(block, Note)]
    assert said[0] == "artifacts/train/report.toml was written by mlxflow 0.0.1."
    assert said[1].startswith("artifacts/quantize/q4/report.toml is damaged (")
    assert said[2] == "artifacts/profile/report.toml is missing. Run: mlxflow build profile"
    for row in table.rows:
        assert f"{row[0]}: {row[1]}" in drawn.drawing, "the plot's name for a screen reader"


def test_a_workflow_without_stages_has_a_note(tmp_path: Path) -> None:
    note, table = stages.section([read(tmp_path)._replace(stages=[])]).blocks
    assert note == Note("There is no stage.")
    assert isinstance(table, Table)
    assert list(table.rows) == []
