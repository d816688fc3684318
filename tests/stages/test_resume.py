"""Real processes, really killed: the next run goes on and comes to the same bytes."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxflow.cli import command
from mlxflow.models import model_folder
from mlxflow.storage import atomic_folders, report_files, report_structs
from mlxflow.training import model_artifact
from mlxflow.training.validation import Validator
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import mlxflow, rest_in_matrix, write_workflow

TEXT = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 240
batch_size = 4
grad_accum_steps = 4
adjust_every = 7
save_every = 3
eval_every = 20
keep = "best"
max_validation_rows = 8
model = { hidden_size = 32, intermediate_size = 32 }
"""


def _digests(folder: Path) -> dict[str, str]:
    names = ("model.safetensors", "config.json", "tokenizer.json")
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in names}  # noqa: S324


def _start(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mlxflow", "run", "train"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(folder.parent / "cache")},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_workflow(folder, TEXT)
    for stage in ("pretokenize", "train"):
        made = mlxflow(folder, "run", stage)
        assert made.returncode == 0, made.stderr
    assert not (folder / "artifacts" / ".mlxflow" / "unfinished" / "train").is_dir() or not list(
        (folder / "artifacts" / ".mlxflow" / "unfinished" / "train").iterdir()
    )
    return folder


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "artifacts" / ".mlxflow" / "unfinished" / "train").glob("*/step-*/state.json"))


def _again(whole: Path, folder: Path) -> Path:
    copy = Path(shutil.copytree(whole, folder / "copy"))
    shutil.rmtree(copy / "artifacts" / "train")
    return copy


@pytest.mark.parametrize("seed", rest_in_matrix(range(3), 1))
def test_a_killed_training_resumes_to_the_same_bytes(whole: Path, tmp_path: Path, seed: int) -> None:
    folder = _again(whole, tmp_path)
    generator = random.Random(seed)
    for _ in range(3):
        before = _checkpoints(folder)
        process = _start(folder)
        while process.poll() is None and _checkpoints(folder) == before:
            time.sleep(0.01)
        time.sleep(generator.random() * 0.15)
        process.kill()
        process.communicate()
    was_cut_off = bool(_checkpoints(folder))  # a fast machine may have come to the end in between
    last = mlxflow(folder, "run", "train")
    assert last.returncode == 0, last.stderr
    assert ("resumes from step" in last.stderr) == was_cut_off
    assert _digests(folder / "artifacts" / "train") == _digests(whole / "artifacts" / "train")
    assert not _checkpoints(folder)


def test_a_stop_signal_saves_a_checkpoint_and_is_reported(whole: Path, tmp_path: Path) -> None:
    folder = _again(whole, tmp_path)
    process = _start(folder)
    while process.poll() is None and not _checkpoints(folder):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "train: stopped after step " in said
    assert "lets the next run resume from there" in said
    assert "Traceback" not in said
    last = mlxflow(folder, "run", "train")
    assert last.returncode == 0, last.stderr
    assert _digests(folder / "artifacts" / "train") == _digests(whole / "artifacts" / "train")


def test_a_checkpoint_of_another_configuration_is_kept_with_a_message(whole: Path, tmp_path: Path) -> None:
    folder = _again(whole, tmp_path)
    process = _start(folder)
    while process.poll() is None and not _checkpoints(folder):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = _checkpoints(folder)
    (folder / "workflow.toml").write_text(TEXT.replace("num_steps = 240", "num_steps = 4"))
    other = mlxflow(folder, "run", "train")
    assert other.returncode == 0, other.stderr
    assert "a checkpoint of another configuration (train.num_steps: 240 -> 4); it is left alone" in other.stderr
    assert _checkpoints(folder) == kept


def test_an_interrupted_doit_names_the_step_that_training_resumes_from(whole: Path, tmp_path: Path) -> None:
    folder = _again(whole, tmp_path)
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.parent / "cache")}
    command = [sys.executable, "-m", "doit", "train"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment)
    while process.poll() is None and not _checkpoints(folder):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert "train: stopped after step " in said
    assert "interrupted: finished stages are kept" in said
    metrics = folder / "artifacts" / "train" / "metrics.jsonl"
    last = mlxflow(folder, "run", "train")
    assert last.returncode == 0, last.stderr
    assert "step 0 of" not in last.stderr, "what was told is not told again"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"train"' in line]
    assert steps == list(range(10, 241, 10))
    assert _digests(folder / "artifacts" / "train") == _digests(whole / "artifacts" / "train")


SHORT = TEXT.replace("num_steps = 240", "num_steps = 8").replace("save_every = 3", "save_every = 0")


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without checkpoints."""
    folder = tmp_path_factory.mktemp("short")
    write_workflow(folder, SHORT)
    for stage in ("pretokenize", "train"):
        _run_here(folder, stage)
    return folder


def _run_here(folder: Path, stage: str = "train") -> Path:
    workflow = load_workflow(folder / "workflow.toml")
    return execute_stage(workflow, workflow.find(stage))


def _interrupting(call: Callable[..., Any], number: int, after: int = 0) -> Callable[..., Any]:
    """Return a function that a signal arrives in."""
    calls_left = after

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls_left
        calls_left -= 1
        if calls_left == -1:
            signal.raise_signal(number)
        return call(*arguments, **named)

    return interrupted


# Where the signal arrives: the last of two validations, the writing of the model, its measurement, its publication
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "validation": (Validator, "validate", 1),
    "writing": (model_folder, "save", 0),
    "measuring": (model_artifact, "measure_artifact", 0),
    "report": (report_structs, "write", 0),
    "publishing": (atomic_folders, "_flush_all", 0),
}


@pytest.mark.parametrize(
    ("moment", "number"), [*((moment, signal.SIGINT) for moment in MOMENTS), ("writing", signal.SIGTERM)]
)
def test_a_run_interrupted_after_its_last_step_loses_no_step(
    short: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    number: signal.Signals,
) -> None:
    folder = tmp_path / "job"
    shutil.copytree(short, folder)
    before = _digests(folder / "artifacts/train")
    shutil.rmtree(folder / "artifacts/train")
    owner, name, after = MOMENTS[moment]
    monkeypatch.setattr(owner, name, _interrupting(getattr(owner, name), number, after))
    signal.signal(signal.SIGTERM, command._terminate)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            _run_here(folder)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.undo()
    (checkpoint,) = _checkpoints(folder)
    assert f"train: stopped after step 8; {checkpoint.parent} lets the next run" in capsys.readouterr().err
    assert not (folder / "artifacts/train").exists()
    assert _digests(_run_here(folder)) == before
    assert f"train: resumes from step 8 ({checkpoint.parent})" in capsys.readouterr().err
    metrics = (folder / "artifacts/train/metrics.jsonl").read_text().splitlines()
    assert [one["step"] for one in map(json.loads, metrics) if one["kind"] == "validation"] == [0, 8]
    assert report_files.read_report(folder / "artifacts/train/report.toml")["steps"] == 8
    assert not _checkpoints(folder)
