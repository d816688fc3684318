"""Stages that are reported while they run, through doit's and mlxflow's own processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import mlxflow, write_workflow

TEXT = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 200
batch_size = 4
log_every = 5
save_every = 20
eval_every = 50
max_validation_rows = 8
model = { hidden_size = 32, intermediate_size = 32 }
[tracking]
to = ["tensorboard"]
timeout_seconds = 120
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    write_workflow(folder, TEXT)
    made = mlxflow(folder, "run", "pretokenize")
    assert made.returncode == 0, made.stderr
    return folder


def _logged(project: Path, name: str) -> list[tuple[int, float]]:
    """Return a metric in TensorBoard's files."""
    from mlxflow.tracking import tensorboard_run

    files = sorted(project.glob("artifacts/tracking/tensorboard/train-*/*"))
    scalars = [one for path in files for one in tensorboard_run.read_scalars(path.read_bytes())]
    return [(one.step, round(one.value, 3)) for one in scalars if one.name == name]


def _recorded(project: Path, kind: str) -> list[tuple[int, float]]:
    lines = (project / "artifacts/train/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(one["step"], round(one["loss"], 3)) for one in records if one["kind"] == kind]


def _start(project: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "XDG_CACHE_HOME": str(project.parent / "cache")}
    command = [sys.executable, "-m", "mlxflow", "run", "train"]
    return subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.matrix
def test_a_training_that_is_killed_and_resumes_is_one_run_with_each_step_once(project: Path) -> None:
    pytest.importorskip("tensorboardX")
    with _start(project) as first:
        while first.poll() is None and not any(step >= 60 for step, _ in _logged(project, "train/loss")):
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
    with _start(project) as second:
        _, said = second.communicate()
    assert second.returncode == 0, said
    assert len(list(project.glob("artifacts/tracking/tensorboard/train-*"))) == 1
    assert _logged(project, "train/loss") == _recorded(project, "train")
    assert _logged(project, "validation/loss") == _recorded(project, "validation")
    assert len(_logged(project, "final/last_validation_perplexity")) == 1
    assert said.splitlines()[-1].startswith("tracking: tensorboard: train")
    again = mlxflow(project, "track", "train")
    assert again.stderr.splitlines()[-1].startswith("tracking: tensorboard: train: 0 points sent.")
    assert _logged(project, "train/loss") == _recorded(project, "train")


@pytest.mark.matrix
def test_a_tracker_that_fails_fails_no_stage(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "tensorboardX.py").write_text("raise RuntimeError('out of order')")
    monkeypatch.setenv("PYTHONPATH", str(project))
    ran = mlxflow(project, "build", "train")
    assert ran.returncode == 0, ran.stderr
    line = "tracking: train: tensorboard: out of order. Then: mlxflow track train"
    assert (ran.stdout + ran.stderr).splitlines().count(line) == 1
    assert (project / "artifacts/train/report.toml").is_file()
