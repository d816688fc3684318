"""The lock changes when an artifact was made differently, and only then: real stages, built more than once."""

import shutil
import tomllib
from pathlib import Path

import pytest

from tests.conftest import doit, write_workflow

_SHORT = """
[workflow]
name = "short"

[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }

[train]
num_steps = 4
warmup_steps = 2
batch_size = 4
max_validation_rows = 8
model = { hidden_size = 64, num_layers = 1, num_heads = 2, intermediate_size = 64 }

[[quantize]]
name = "q4"
max_validation_rows = 8

[profile]
suggestions = false
num_steps = 3

[benchmark]
batch_sizes = [2]
num_steps = 1
convergence_steps = 0
max_validation_rows = 8

[report]
models = []
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole workflow, built once."""
    folder = tmp_path_factory.mktemp("twice")
    write_workflow(folder, _SHORT)
    result = doit(folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_rebuild_on_the_same_machine_writes_the_same_lock_file(folder: Path) -> None:
    lock = (folder / "mlxflow.lock").read_bytes()
    pages = [(folder / "artifacts/index.html").read_bytes()]
    shutil.rmtree(folder / "artifacts")
    assert doit(folder).returncode == 0
    pages.append((folder / "artifacts/index.html").read_bytes())
    assert pages[0] != pages[1], "the page shows times"
    assert (folder / "mlxflow.lock").read_bytes() == lock


def test_without_the_state_the_lock_describes_measured_artifacts_too(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(copy / "artifacts/.mlxflow")
    assert doit(copy, "plan").stdout == "nothing to do: 6 stages are fresh\n"
    report = copy / "artifacts/profile/report.toml"
    assert (
        f"last run: {tomllib.loads(report.read_text())['run']['seconds']:,} s" in doit(copy, "info", "profile").stdout
    )
    report.write_text(report.read_text().replace('settings_digest = "', 'settings_digest = "0'))
    assert doit(copy, "plan").stdout.splitlines()[0] == (
        "profile: its artifact has no record: its last run was interrupted, or doit did not start it; "
        "its settings, its code or MLX changed"
    )


def test_another_learning_rate_changes_the_lock_file(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    before = tomllib.loads((copy / "mlxflow.lock").read_text())
    path = copy / "workflow.toml"
    path.write_text(path.read_text().replace("warmup_steps = 2", "warmup_steps = 2\nlearning_rate = 0.002"))
    assert doit(copy, "train").returncode == 0
    after = tomllib.loads((copy / "mlxflow.lock").read_text())
    assert [task for task in before if before[task] != after[task]] == ["train"]
    assert after["train"]["config"]["learning_rate"] == 0.002
    model = "artifacts/train/model.safetensors"
    assert after["train"]["outputs"][model] != before["train"]["outputs"][model]
