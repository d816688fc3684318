from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.stages import train
from mlxflow.storage import report_files
from mlxflow.training import table_settings
from mlxflow.training.settings import AdapterShape, TrainingSettings, read_settings

ADAPTERS = AdapterShape("dora", 4, 20.0, 0.1, 2, ("self_attn.*", "mlp.*"))
SETTINGS = TrainingSettings(adapters=ADAPTERS, kernels=("adamw/float32/float32",), learning_rate=3e-4, weight_decay=0.0)


def _read(folder: Path, table: dict[str, Any]) -> TrainingSettings:
    file = folder / "report.toml"
    report_files.write_report(file, table)
    return read_settings(file, shown="artifacts/train/report.toml", task="train", key="profile.input")


@pytest.mark.parametrize("settings", [SETTINGS, TrainingSettings()])
def test_settings_of_a_report_are_read_unchanged(tmp_path: Path, settings: TrainingSettings) -> None:
    assert _read(tmp_path, {"settings": msgspec.to_builtins(settings)}) == settings


def _mistakes(folder: Path, table: dict[str, Any]) -> list[str]:
    with pytest.raises(ArtifactError) as caught:
        _read(folder, table)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", TrainingSettings.__struct_fields__)
def test_a_missing_setting_is_named_with_file_and_key(tmp_path: Path, name: str) -> None:
    table = msgspec.to_builtins(SETTINGS)
    del table[name]
    assert _mistakes(tmp_path, {"settings": table}) == [
        f"artifacts/train/report.toml: settings.{name}: missing. Run: mlxflow build train"
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arithmetic": "own"}, "settings.arithmetic: unknown key"),
        ({"batch_size": "many"}, "settings.batch_size: expected `int`, got `str`"),
        ({"batch_size": 0}, "settings.batch_size: expected `int` >= 1"),
        ({"precision": "fp8"}, "settings.precision: invalid enum value 'fp8'"),
        ({"adapters": {"method": "lora"}}, "settings.adapters.rank: missing"),
    ],
)
def test_an_unknown_setting_and_an_invalid_one_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert _mistakes(tmp_path, {"settings": msgspec.to_builtins(SETTINGS) | changes}) == [
        f"artifacts/train/report.toml: {said}. Run: mlxflow build train"
    ]


def test_every_invalid_setting_has_a_line(tmp_path: Path) -> None:
    table = {
        name: value for name, value in msgspec.to_builtins(SETTINGS).items() if name not in ("schedule", "workers")
    }
    lines = _mistakes(tmp_path, {"settings": table | {"lr": 1.0}})
    assert [line.split(": ")[1] for line in lines] == ["settings.schedule", "settings.workers", "settings.lr"]


def test_a_report_without_settings_names_the_command_that_writes_one(tmp_path: Path) -> None:
    assert _mistakes(tmp_path, {"steps": 3}) == [
        "artifacts/train/report.toml: settings: missing: expected how the model was trained. Run: mlxflow build train"
    ]


def test_the_defaults_are_those_of_the_train_table() -> None:
    assert table_settings.training_settings(train.Config(), 240) == TrainingSettings()
