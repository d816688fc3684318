"""New models of other architectures than llama: trained from scratch, resumed after a kill, quantized."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.models import model_folder
from mlxflow.storage.report_files import read_report
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from tests.conftest import rest_in_matrix

TEXT = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 24
warmup_steps = 2
batch_size = 4
save_every = 2
eval_every = 0
max_validation_rows = 16
[train.model]
architecture = "%s"
hidden_size = 64
num_layers = 2
num_heads = 2
num_kv_heads = 1
intermediate_size = 64
[train.model.args]
%s
[quantize]
group_size = 32
max_validation_rows = 16
"""

#: Settings that each architecture needs besides the shape.
ARGS = {
    "qwen3": "head_dim = 64",
    "gemma3_text": "head_dim = 32\nquery_pre_attn_scalar = 32\nsliding_window = 8\nsliding_window_pattern = 2",
    "olmo2": "",
    "qwen3_moe": "num_experts = 4\nnum_experts_per_tok = 2\ndecoder_sparse_step = 1\nmlp_only_layers = []\n"
    "moe_intermediate_size = 32\nnorm_topk_prob = true",
    "mamba2": "num_heads = 4\nhead_dim = 32\nintermediate_size = 128\nstate_size = 16\nconv_kernel = 4\nn_groups = 1\n"
    "use_bias = false\nuse_conv_bias = true\ntime_step_limit = [0.001, 100.0]\ntime_step_rank = 4",
}


@pytest.fixture
def job(built: Path, tmp_path: Path) -> Path:
    """A folder with tokens."""
    for name in ("notes", "artifacts/pretokenize"):
        shutil.copytree(built / name, tmp_path / "job" / name)
    return tmp_path / "job"


def _weights(folder: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(folder / "model.safetensors")))


@pytest.mark.parametrize("name", rest_in_matrix(ARGS, "gemma3_text"))
def test_a_new_model_learns_and_is_quantized(job: Path, name: str) -> None:
    (job / "workflow.toml").write_text(TEXT % (name, ARGS[name]))
    workflow = load_workflow(job / "workflow.toml")
    folder = execute_stage(workflow, workflow.find("train"))
    report = read_report(folder / "report.toml")
    assert report["last_validation_perplexity"] < report["first_validation_perplexity"] / 3
    model, config = model_folder.load(folder)
    assert config["model_type"] == name
    assert len(model.layers) == 2
    quantized = read_report(execute_stage(workflow, workflow.find("quantize")) / "report.toml")
    assert quantized["quantized_layers"]
    assert quantized["quality"]["perplexity"] == pytest.approx(quantized["quality"]["dense_perplexity"], rel=0.5)


@pytest.mark.parametrize(
    "name", [name if name == "qwen3_moe" else pytest.param(name, marks=pytest.mark.matrix) for name in ARGS]
)
def test_a_killed_training_of_another_architecture_resumes_to_the_same_weights(
    job: Path, tmp_path: Path, name: str
) -> None:
    text = (TEXT % (name, ARGS[name])).replace("num_steps = 24", "num_steps = 60")
    (job / "workflow.toml").write_text(text)
    whole = Path(shutil.copytree(job, tmp_path / "whole"))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "mlxflow", "run", "train"]
    subprocess.run(command, cwd=whole, env=environment, check=True, capture_output=True)
    with subprocess.Popen(command, cwd=job, env=environment, stderr=subprocess.PIPE, text=True) as training:
        unfinished = job / "artifacts/.mlxflow/unfinished/train"
        while not list(unfinished.glob("*/step-*/state.json")):
            assert training.poll() is None
            time.sleep(0.01)
        training.send_signal(signal.SIGKILL)
    again = subprocess.run(command, cwd=job, env=environment, check=True, capture_output=True, text=True)
    assert "step" in again.stderr
    one, other = (_weights(root / "artifacts/train") for root in (whole, job))
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "qwen33",
            "",
            'train.model.architecture = "qwen33": mlx-lm has no such architecture. Did you mean qwen3 or ',
        ),
        (
            "qwen3",
            "head_dims = 32",
            "train.model.args.head_dims = 32: qwen3 has no such setting. Did you mean head_dim?",
        ),
        ("qwen3", 'head_dim = "a"', 'train.model.args.head_dim = "a": expected a whole number. Change it.'),
        ("olmo2", "num_hidden_layers = 0", "train.model.args.num_hidden_layers = 0: expected a number from 1 to "),
        (
            "qwen3_moe",
            "num_experts = 4",
            "train.model.args = { num_experts = 4 }: qwen3_moe also needs num_experts_per_tok, decoder_sparse_step, ",
        ),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, args: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("a text")
    Path("workflow.toml").write_text(TEXT % (name, args))
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    assert str(caught.value).startswith(f"workflow.toml: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_an_architecture_that_gguf_has_no_name_for_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("a text")
    Path("workflow.toml").write_text(TEXT % ("mamba2", ARGS["mamba2"]) + "[export]\n")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(Path("workflow.toml"))
    told: Any = str(caught.value)
    assert told.startswith('workflow.toml: export.model = "train": is of the architecture "mamba2", which cannot be')
