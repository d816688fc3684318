import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mlxflow.storage import atomic_folders, report_files
from tests.conftest import STAGES, mlxflow


def test_check_prints_the_workflow_with_every_default(job: Path) -> None:
    result = mlxflow(job, "check")
    assert result.returncode == 0, result.stderr
    resolved = tomllib.loads(result.stdout)
    assert resolved["train"]["num_steps"] == 20
    assert resolved["train"]["max_grad_norm"] == 1.0
    assert [variant["name"] for variant in resolved["quantize"]] == ["q4", "q8"]


def test_check_tells_every_mistake_and_exits_with_2(job: Path) -> None:
    (job / "workflow.toml").write_text("[train]\nnum_step = 1\n[profile]\nnum_steps = 0\n")
    result = mlxflow(job, "check")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "workflow.toml: train.num_step: unknown key. Did you mean train.num_steps?",
        "workflow.toml: profile.num_steps = 0: expected a whole number from 1 to 1_000_000_000. "
        "Use profile.num_steps = 20 (the default) or remove the key.",
    ]


def test_a_stage_without_its_input_names_the_command_that_makes_it(job: Path) -> None:
    result = mlxflow(job, "run", "train")
    assert result.returncode == 2
    assert result.stderr == "artifacts/pretokenize: missing. Run: doit pretokenize\n"
    assert not (job / "artifacts/train").exists()


def test_a_damaged_input_is_refused_by_name(job_copy: Path) -> None:
    path = job_copy / "artifacts/train/model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    result = mlxflow(job_copy, "run", "quantize:q4")
    assert result.returncode == 2
    assert result.stderr == (
        f"artifacts/train/model.safetensors: damaged (it has {size - 5:,} bytes, its header says {size:,}). "
        "Run: doit train\n"
    )


def test_an_unknown_stage_is_told(job: Path) -> None:
    result = mlxflow(job, "run", "deploy")
    assert result.returncode == 2
    assert result.stderr == f"deploy: no such stage in workflow.toml. Known: {', '.join(STAGES)}.\n"


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
        (
            "[2, 4]",
            "[2, 4000]",
            "benchmark",
            "benchmark.batch_sizes = 4000: the training text fills {rows} rows of 16 tokens. "
            "Lower benchmark.batch_sizes or add text to pretokenize.sources.\n",
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


def test_a_corpus_too_small_for_a_row_is_told(job: Path) -> None:
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


def test_generate_prints_the_prompt_and_what_the_model_makes_of_it(built: Path) -> None:
    arguments = ("generate", "artifacts/quantize/q8", "--prompt", "note 3 line", "--max-tokens", "8")
    first, second = mlxflow(built, *arguments), mlxflow(built, *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("note 3 line")
    assert len(first.stdout.strip()) > len("note 3 line")
    assert first.stdout == second.stdout


def test_generate_from_what_is_no_model_folder_is_told(built: Path) -> None:
    result = mlxflow(built, "generate", "notes", "--prompt", "x")
    assert result.returncode == 2
    assert result.stderr == "notes: has no config.json. Name a model folder.\n"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--prompt", "", "generate: --prompt = '': expected a question or a text. Write a word at least."),
        ("--max-tokens", "0", "generate: --max-tokens = 0: expected at least 1. Use 100 (the default)."),
        ("--max-tokens", "-3", "generate: --max-tokens = -3: expected at least 1. Use 100 (the default)."),
        ("--temperature", "-1", "generate: --temperature = -1.0: expected 0 or more. Use 0 (the default)."),
        ("--temperature", "nan", "generate: --temperature = nan: expected 0 or more. Use 0 (the default)."),
        ("--seed", "-1", "generate: --seed = -1: expected a number from 0 to 2^64 - 1. Use 0 (the default)."),
    ],
)
def test_generate_refuses_a_call_that_does_not_fit(built: Path, option: str, value: str, said: str) -> None:
    arguments = {"--prompt": "note", option: value}
    call = [f"{name}={given}" for name, given in arguments.items()]
    result = mlxflow(built, "generate", "artifacts/train", *call)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"{said}\n")


def test_generate_without_a_tokenizer_is_told_in_one_line(job_copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (job_copy / "artifacts/train" / name).unlink()
    result = mlxflow(job_copy, "generate", "artifacts/train", "--prompt", "note")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("artifacts/train: its tokenizer cannot be opened (")


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


def test_a_file_where_artifacts_belong_is_told(job: Path) -> None:
    (job / "artifacts").write_text("a file")
    result = mlxflow(job, "run", "pretokenize")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "cannot be written (" in result.stderr
    assert (job / "artifacts").read_text() == "a file"


def test_doctor_tells_the_device_and_the_versions(tmp_path: Path) -> None:
    result = mlxflow(tmp_path, "doctor")
    assert result.returncode == 0, result.stderr
    words = " ".join(result.stdout.split())
    for expected in ("device ", "GFLOP/s", "BLAS ", "mlx-lm ", f"Python {sys.version.split()[0]}"):
        assert expected in words


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
