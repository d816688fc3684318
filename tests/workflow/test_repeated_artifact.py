import tomllib
from pathlib import Path
from typing import Any

import pytest

from mlxflow.messages.errors import ArtifactError
from mlxflow.workflow.repeated_artifact import repeated_artifact
from tests.conftest import mlxflow, write_workflow

_TEXT = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 3
batch_size = 4
checkpointing = "layers"
model = { hidden_size = 32, intermediate_size = 32 }
"""


def _every(report: Path) -> Any:
    return tomllib.loads(report.read_text())["settings"]["checkpoint_every"]


def test_an_artifact_of_other_settings_is_not_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    file = write_workflow(folder, _TEXT)
    for stage in ("pretokenize", "train"):
        assert mlxflow(folder, "run", stage).returncode == 0
    assert _every(folder / "artifacts/train/report.toml") == 1
    file.write_text(_TEXT.replace('"layers"', '"auto"'))
    done = mlxflow(folder, "run", "train", "--into", "other")
    assert done.returncode == 0, done.stderr
    assert 'checkpointing = "auto": no layer is recomputed' in done.stderr
    assert _every(folder / "other/report.toml") == 0


def test_an_artifact_counts_by_its_settings_and_inputs(tmp_path: Path) -> None:
    own = {"settings_digest": "a", "inputs_digest": "b"}
    assert repeated_artifact(tmp_path, own) is None
    report = tmp_path / "report.toml"
    report.write_text('[stage]\nsettings_digest = "a"\ninputs_digest = "b"\nseed = "0"\n')
    assert repeated_artifact(tmp_path, own) == tmp_path
    assert repeated_artifact(tmp_path, own | {"inputs_digest": "c"}) is None
    assert repeated_artifact(tmp_path, own | {"settings_digest": "c"}) is None
    report.write_text("[stage]\nseed = 0\n")
    with pytest.raises(ArtifactError, match=r"Remove it and build it again\."):
        repeated_artifact(tmp_path, own)
