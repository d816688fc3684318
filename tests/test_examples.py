"""Every example is run, on a copy, with its own data."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for copies of examples; use `_open`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def _open(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy an example without what a user built in it, and make the copy the current folder."""
    ignored = shutil.ignore_patterns("artifacts", "mlxflow.lock")
    project = Path(shutil.copytree(EXAMPLES / name, folder / name, ignore=ignored))
    monkeypatch.chdir(project)
    return project


def _build(workflow: str = "workflow.toml", *stages: str) -> None:
    """Run stages of a workflow in this process, those that they read from first; all of them if none is named."""
    loaded = load_workflow(Path(workflow))
    for stage in loaded.stages:
        if not stages or stage.name in stages:
            execute_stage(loaded, stage)


def _improves(artifact: str) -> bool:
    """Whether the published weights are better on the held-out rows than those at the start."""
    figures = tomllib.loads((Path(artifact) / "report.toml").read_text())
    return bool(figures["last_validation_perplexity"] < figures["first_validation_perplexity"])


def test_hello_builds_every_stage_and_the_page(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = _open("hello", copied, monkeypatch)
    _build()
    assert _improves("artifacts/train")
    assert (project / "artifacts/index.html").stat().st_size > 10_000


def test_notes_publish_a_model_that_is_better_than_at_the_start(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _open("notes", copied, monkeypatch)
    _build("workflow.toml", "pretokenize", "train")
    assert _improves("artifacts/train")


@pytest.mark.matrix
def test_chat_lora_teaches_the_conversations(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = _open("chat-lora", copied, monkeypatch)
    _build("base/workflow.toml", "pretokenize", "train")
    _build("workflow.toml", "pretokenize", "train")
    assert _improves("artifacts/train")
    assert (project / "artifacts/train/adapters/adapters.safetensors").is_file()
    _build("workflow.toml", "quantize", "evaluate")
    base, tuned, _ = tomllib.loads((project / "artifacts/evaluate/report.toml").read_text())["accuracies"]
    assert all(one["uses_chat"] for one in (base, tuned))
    assert tuned["accuracy"] > base["accuracy"]


@pytest.mark.matrix
def test_pretrain_then_chat_is_one_graph_in_which_each_model_improves(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = _open("pretrain-then-chat", copied, monkeypatch)
    _build("workflow.toml", "pretokenize", "train", "quantize")
    assert all(_improves(f"artifacts/train/{name}") for name in ("base", "chat", "adapters"))
    assert (project / "artifacts/quantize/q4/model.safetensors").is_file()
    template = json.loads((project / "artifacts/train/chat/tokenizer_config.json").read_text())["chat_template"]
    assert "<|im_start|>" in template


def test_quantize_only_trains_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = _open("quantize-only", copied, monkeypatch)
    _build("base/workflow.toml", "pretokenize", "train")
    _build("workflow.toml", "quantize")
    sizes = [
        (project / folder / "model.safetensors").stat().st_size
        for folder in ("artifacts/quantize/q4", "artifacts/quantize/q8", "base/artifacts/train")
    ]
    assert sizes == sorted(sizes)
    assert not (project / "artifacts/train").exists()


def test_sweep_trains_and_quantizes_each_variant(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = _open("sweep", copied, monkeypatch)
    _build("workflow.toml", "pretokenize", "train", "quantize")
    models = [path.parent.relative_to(project / "artifacts").as_posix() for path in project.rglob("model.safetensors")]
    assert sorted(models) == ["quantize/bits4", "quantize/bits8", "train/fast", "train/slow"]


def test_ci_github_has_the_workflow_of_the_template(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = _open("ci-github", copied, monkeypatch)
    template = REPOSITORY / "mlxflow/cli/templates/github.yml"
    assert (project / ".github/workflows/mlxflow.yml").read_text() == template.read_text()
    assert {stage.name for stage in load_workflow(Path("workflow.toml")).stages} >= {"train", "quantize", "report"}


def test_profile_any_model_prints_the_peak_of_each_phase(tmp_path: Path) -> None:
    program = [sys.executable, str(EXAMPLES / "profile-any-model.py")]
    lines = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    peaks = {name: float(rest.split()[0]) for name, _, rest in (line.partition(": ") for line in lines)}
    assert list(peaks) == ["forward", "training_step", "the whole program"]
    assert 0 < peaks["forward"] < peaks["training_step"] <= peaks["the whole program"]
