from pathlib import Path

import msgspec
import pytest

from mlxflow.errors import ArtifactError
from mlxflow.stage_reports.train import TrainReport
from mlxflow.storage import report_structs
from mlxflow.storage.report_files import read_report
from mlxflow.training.settings import TrainingSettings


def test_settings_are_read_with_every_key(built: Path) -> None:
    table = read_report(built / "artifacts/train/report.toml")
    report = report_structs.parse(table, TrainReport, shown="report.toml", advice="").figures
    assert report.settings == msgspec.convert(table["settings"], TrainingSettings)
    del table["settings"]["keep"]
    with pytest.raises(ArtifactError) as caught:
        report_structs.parse(table, TrainReport, shown="report.toml", advice="Run: doit train")
    assert str(caught.value) == "report.toml: settings.keep: missing. Run: doit train"


def test_the_train_report_has_every_setting_resolved(built: Path) -> None:
    settings = read_report(built / "artifacts/train/report.toml")["settings"]
    assert settings["fused_loss"] is True  # "auto" on the CPU
    assert settings["weight_decay"] == 0.1  # "auto" with AdamW
    assert settings["optimizer_options"] == {"betas": [0.9, 0.95]}
    assert (settings["batch_size"], settings["masks_documents"], settings["precision"]) == (4, False, "fp32")
