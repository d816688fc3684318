import tomllib
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.messages.errors import ArtifactError, CallError, StageError
from mlxflow.report.stage_reports.pretokenize import PretokenizeReport
from mlxflow.stages import pretokenize
from mlxflow.storage import atomic_folders, report_files
from mlxflow.workflow import stage
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.model import Workflow
from tests.late_device import LateDevice


@pytest.fixture
def workflow(job: Path, monkeypatch: pytest.MonkeyPatch) -> Workflow:
    monkeypatch.chdir(job)
    return load_workflow(Path("workflow.toml"))


def _pretokenize(workflow: Workflow) -> Path:
    return execute_stage(workflow, workflow.find("pretokenize"))


def test_a_report_has_the_provenance_of_the_artifact(workflow: Workflow) -> None:
    report = report_files.read_report(_pretokenize(workflow) / "report.toml")
    assert report["stage"]["stage"] == "pretokenize"
    assert report["stage"]["seed"] == "0"
    assert report["run"]["device_name"]
    assert report["run"]["seconds"] > 0
    assert report["run"]["peak_rss_bytes"] > 10_000_000


def test_digests_of_settings_and_inputs_change_independently(workflow: Workflow) -> None:
    def digests() -> tuple[str, str]:
        told = report_files.read_report(_pretokenize(load_workflow(Path("workflow.toml"))) / "report.toml")["stage"]
        return told["settings_digest"], told["inputs_digest"]

    first = digests()
    path = Path("workflow.toml")
    path.write_text(path.read_text().replace("vocab_size = 300", "vocab_size = 310"))
    second = digests()
    Path("notes/00.txt").write_text("another note")
    third = digests()
    assert first[0] != second[0] == third[0]
    assert first[1] == second[1] != third[1]


def test_a_stage_can_be_written_elsewhere(workflow: Workflow, tmp_path: Path) -> None:
    folder = execute_stage(workflow, workflow.find("pretokenize"), tmp_path / "elsewhere")
    assert folder == tmp_path / "elsewhere"
    assert (folder / "report.toml").exists()
    assert not (workflow.root / "artifacts/pretokenize").exists()


def test_a_stage_that_loses_its_variants_keeps_their_artifacts_and_a_users_files(workflow: Workflow) -> None:
    path = Path("workflow.toml")
    variants = path.read_text().replace("[pretokenize]", '[[pretokenize]]\nname = "a"', 1)
    path.write_text(variants.replace("[train]", '[train]\ninput = "pretokenize:a"', 1))
    loaded = load_workflow(path)
    made = execute_stage(loaded, loaded.find("pretokenize:a"))
    before = {file.name: (file.read_bytes(), file.stat().st_ino) for file in made.iterdir()}
    folder = _pretokenize(workflow)
    (folder / "notes.txt").write_text("mine")
    assert _pretokenize(workflow) == folder
    assert {file.name: (file.read_bytes(), file.stat().st_ino) for file in made.iterdir()} == before
    listed = report_files.read_report(folder / "report.toml")["run"]["files"]
    assert "report.toml" in listed
    assert sorted(file.name for file in folder.iterdir()) == sorted([*listed, "a", "notes.txt"])


def test_a_folder_that_no_stage_wrote_is_not_written_into(workflow: Workflow, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(CallError) as caught:
        execute_stage(workflow, workflow.find("pretokenize"), mine)
    assert str(caught.value) == f"--into {mine}: holds files that no stage wrote. Name a new or an empty folder."
    assert [file.name for file in mine.iterdir()] == ["thesis.txt"]


def test_mlx_gets_the_memory_limit(workflow: Workflow) -> None:
    Path("workflow.toml").write_text(
        Path("workflow.toml").read_text().replace('name = "tiny"', 'memory_limit = "3 GB"')
    )
    before = mx.set_memory_limit(10**10)
    try:
        _pretokenize(load_workflow(Path("workflow.toml")))
        assert mx.set_memory_limit(10**10) == 10**10  # tokenizing does without MLX
        loaded = load_workflow(Path("workflow.toml"))
        execute_stage(loaded, loaded.find("train"))
        assert mx.set_memory_limit(10**10) == 3 * 10**9
    finally:
        mx.set_memory_limit(before)


def test_every_missing_input_is_reported_once_with_its_stage(workflow: Workflow) -> None:
    with pytest.raises(ArtifactError) as caught:
        execute_stage(workflow, workflow.find("benchmark"))
    assert caught.value.problems == (
        "artifacts/train: missing. Run: mlxflow build train",
        "artifacts/quantize/q4: missing. Run: mlxflow build quantize:q4",
        "artifacts/quantize/q8: missing. Run: mlxflow build quantize:q8",
        "artifacts/pretokenize: missing. Run: mlxflow build pretokenize",
    )
    assert not Path("artifacts/benchmark").exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "pretokenize: ended without writing train.safetensors."),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "train.safetensors: was not written to its end ("),
    ],
)
def test_an_incomplete_output_is_never_published(
    workflow: Workflow, monkeypatch: pytest.MonkeyPatch, spoil: Any, said: str
) -> None:
    before = (_pretokenize(workflow) / "report.toml").read_bytes()
    real = pretokenize.run

    def spoilt(*, outputs: pretokenize.Outputs, **others: Any) -> PretokenizeReport:
        report = real(outputs=outputs, **others)
        spoil(outputs.train)
        return report

    monkeypatch.setattr(pretokenize, "run", spoilt)
    with pytest.raises(StageError) as caught:
        _pretokenize(workflow)
    assert str(caught.value).startswith(said)
    assert Path("artifacts/pretokenize/report.toml").read_bytes() == before
    assert atomic_folders.partial_folders(Path("artifacts")) == []


def test_times_and_host_names_are_only_in_the_run_table(workflow: Workflow) -> None:
    first = tomllib.loads((_pretokenize(workflow) / "report.toml").read_text())
    second = tomllib.loads((_pretokenize(workflow) / "report.toml").read_text())
    assert first.pop("run").keys() == second.pop("run").keys()
    assert first == second
    assert stage.stage_name(workflow.find("pretokenize").module) == first["stage"]["stage"]


@pytest.mark.parametrize("task", ["train", "quantize:q4", "profile", "benchmark"])
def test_an_error_of_memory_that_no_call_has_raised_yet_fails_the_stage(
    task: str, job_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal the last command buffer may have failed although every call of the stage succeeded."""
    workflow = load_workflow(job_copy / "workflow.toml")
    found = workflow.find(task)
    report = workflow.root / found.folder / "report.toml"
    before = report.read_bytes()
    device = LateDevice(monkeypatch)

    def run(**_: Any) -> None:
        device.calls_left = 1

    monkeypatch.setattr(found.module, "run", run)
    with pytest.raises(StageError) as caught:
        execute_stage(workflow, found)
    assert str(caught.value) == (
        f"{task}: out of memory: memory limit {show_bytes(mx.get_memory_limit())}. "
        "Close other programs, or use a smaller batch_size or model, and run it again."
    )
    assert device.raised_by == ["synchronize"]
    assert report.read_bytes() == before
