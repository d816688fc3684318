from pathlib import Path

import msgspec
import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.report.stage_reports.train import TrainReport
from mlxflow.storage import report_structs
from mlxflow.storage.report_files import read_report
from mlxflow.training.figures import TrainingFigures
from mlxflow.training.settings import TrainingSettings


def test_settings_are_read_with_every_key(built: Path) -> None:
    table = read_report(built / "artifacts/train/report.toml")
    report = report_structs.parse(table, TrainReport, shown="report.toml", advice="").figures
    assert report.settings == msgspec.convert(table["settings"], TrainingSettings)
    del table["settings"]["keep"]
    with pytest.raises(ArtifactError) as caught:
        report_structs.parse(table, TrainReport, shown="report.toml", advice="Run: mlxflow build train")
    assert str(caught.value) == "report.toml: settings.keep: missing. Run: mlxflow build train"


def test_the_train_report_has_every_setting_resolved(built: Path) -> None:
    settings = read_report(built / "artifacts/train/report.toml")["settings"]
    assert settings["fused_loss"] is True  # "auto" on the CPU
    assert settings["weight_decay"] == 0.1  # "auto" with AdamW
    assert settings["optimizer_options"] == {"betas": [0.9, 0.95]}
    assert (settings["batch_size"], settings["masks_documents"], settings["precision"]) == (4, False, "fp32")


def test_the_figures_of_training_have_the_same_names_and_types_as_in_a_quantize_report() -> None:
    """A train report holds them beside its own keys, so no struct can be nested in it or be its base."""
    own = {field.name: field.type for field in msgspec.structs.fields(TrainReport)}
    figures = {field.name: field.type for field in msgspec.structs.fields(TrainingFigures)}
    assert figures.items() <= own.items()
    assert list(figures) == [name for name in own if name in figures]
