import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlxflow.storage import atomic_folders, report_files
from tests.conftest import mlxflow


def test_a_damaged_input_is_refused_by_name(job_copy: Path) -> None:
    path = job_copy / "artifacts/train/model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    result = mlxflow(job_copy, "run", "quantize:q4")
    assert result.returncode == 2
    assert result.stderr == (
        f"artifacts/train/model.safetensors: damaged (it has {size - 5:,} bytes, its header says {size:,}). "
        "Run: mlxflow build train\n"
    )


@pytest.mark.parametrize(
    ("old", "new", "stage", "said"),
    [
        (
            "batch_size = 4\neval_every",
            "batch_size = 4000\neval_every",
            "train",
            "train.batch_size = 4000: the training text fills {rows} rows of 16 tokens. "
            "Lower train.batch_size or add text to pretokenize.sources.\n",
        ),
    ],
)
def test_a_corpus_too_small_for_a_batch_keeps_the_old_artifact(
    job_copy: Path, old: str, new: str, stage: str, said: str
) -> None:
    workflow = job_copy / "workflow.toml"
    text = workflow.read_text()
    assert text.count(old) == 1
    workflow.write_text(text.replace(old, new))
    before = (job_copy / "artifacts" / stage / "report.toml").read_bytes()
    rows = report_files.read_report(job_copy / "artifacts/pretokenize/report.toml")["train"]["rows"]
    result = mlxflow(job_copy, "run", stage)
    assert (result.returncode, result.stderr) == (2, said.format(rows=rows))
    assert (job_copy / "artifacts" / stage / "report.toml").read_bytes() == before
    assert atomic_folders.partial_folders(job_copy / "artifacts") == []


def test_a_corpus_too_small_for_a_row_is_an_error(job: Path) -> None:
    for path in (job / "notes").iterdir():
        path.write_text("a")
    result = mlxflow(job, "run", "pretokenize")
    assert result.returncode == 2
    assert result.stderr == (
        "pretokenize.sources: the train documents have 2 tokens beside the end that is held out (19 documents are "
        "equal to others), one row of pretokenize.context_length = 16 needs 17. Add text, or lower the context "
        "length.\n"
    )
    assert not (job / "artifacts/pretokenize").exists()


@pytest.mark.parametrize("stage", ["profile", "benchmark"])
def test_training_steps_on_a_quantized_model_are_refused(job_copy: Path, stage: str) -> None:
    workflow = job_copy / "workflow.toml"
    workflow.write_text(workflow.read_text().replace(f"[{stage}]", f'[{stage}]\ninput = "quantize:q4"'))
    result = mlxflow(job_copy, "run", stage)
    assert (result.returncode, result.stderr) == (
        2,
        f"{stage}.input: artifacts/quantize/q4 is quantized, and training steps need a dense model. "
        "Name a train stage.\n",
    )


def test_the_builtin_corpus_is_tokenized(tmp_path: Path) -> None:
    (tmp_path / "workflow.toml").write_text("[pretokenize]\ntokenizer = { vocab_size = 300 }\n")
    result = mlxflow(tmp_path, "run", "pretokenize")
    assert result.returncode == 0, result.stderr
    report = report_files.read_report(tmp_path / "artifacts/pretokenize/report.toml")
    assert report["sources"][0]["text_bytes"] > 8_000_000
    assert report["train"]["documents"] > 300


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_is_stopped_keeps_the_old_artifact(job_copy: Path, number: signal.Signals) -> None:
    workflow = job_copy / "workflow.toml"
    workflow.write_text(workflow.read_text().replace("num_steps = 20", "num_steps = 1000000"))
    before = (job_copy / "artifacts/train/model.safetensors").read_bytes()
    command = [sys.executable, "-m", "mlxflow", "run", "train"]
    with subprocess.Popen(command, cwd=job_copy, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if "loss" in line:
                break
        os.kill(process.pid, number)
        assert "Traceback" not in process.stderr.read()
        assert process.wait() == 128 + number
    assert (job_copy / "artifacts/train/model.safetensors").read_bytes() == before
    assert atomic_folders.partial_folders(job_copy / "artifacts") == []
