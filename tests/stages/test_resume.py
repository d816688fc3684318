"""Real processes, really killed: the next run goes on and comes to the same bytes."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import mlxflow, rest_in_matrix

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
    from tests.conftest import write_workflow

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
    import shutil

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
