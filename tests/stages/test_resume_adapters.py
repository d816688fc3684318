"""A training of adapters beside quantized layers that is killed, in a real process, ends in the same bytes."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.conftest import mlxflow, rest_in_matrix, write_workflow

_DENSE = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 4
batch_size = 4
model = { hidden_size = 64, intermediate_size = 64 }
"""

_ADAPTERS: dict[str, dict[str, Any]] = {
    "lora, layers recomputed, dropout": {
        "method": "lora",
        "checkpointing": "layers",
        "lora": {"rank": 4, "dropout": 0.1},
    },
    "lora, bf16": {"method": "lora", "precision": "bf16", "lora": {"rank": 4}},
    "dora": {"method": "dora", "lora": {"rank": 4}},
}

_CASES = [
    ("lora, layers recomputed, dropout", {"bits": 4, "group_size": 32}),
    ("lora, bf16", {"bits": 4, "group_size": 64}),
    ("dora", {"bits": 8, "group_size": 32}),
    ("lora, layers recomputed, dropout", {"mode": "mxfp4"}),
    ("lora, layers recomputed, dropout", {"mode": "nvfp4"}),
]


def _workflow(model: Path, adapter: dict[str, Any], mode: dict[str, Any]) -> str:
    tables: dict[str, Any] = {
        "pretokenize": {"sources": ["notes"], "context_length": 16, "tokenizer": {"from": str(model)}},
        "quantize": [{"name": "q", "model": str(model), "data": "pretokenize", "max_validation_rows": 4} | mode],
        "train": {
            "model": {"from": "quantize:q"},
            "num_steps": 200,
            "batch_size": 4,
            "save_every": 3,
            "max_validation_rows": 8,
            **adapter,
        },
    }
    return tomli_w.dumps(tables)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_workflow(folder, _DENSE)
    for stage in ("pretokenize", "train"):
        made = mlxflow(folder, "run", stage)
        assert made.returncode == 0, made.stderr
    return folder / "artifacts/train"


def _digest(folder: Path) -> str:
    files = sorted((folder / "artifacts/train").glob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize(
    ("name", "mode"),
    rest_in_matrix(_CASES, _CASES[0]),
)
def test_adapters_beside_quantized_layers_end_in_the_same_bytes_after_a_kill(
    name: str, mode: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    folders = _projects(tmp_path, _workflow(dense, _ADAPTERS[name], mode))
    _kill_one_and_compare(*folders, cache=tmp_path / "cache")


@pytest.mark.gpu
def test_a_killed_run_on_a_gpu_multiplies_by_the_recorded_ways(tmp_path: Path) -> None:
    """What is faster through a dense copy was decided before the kill, and the results of trials are gone after it."""
    dense = tmp_path / "dense"
    dense.mkdir()
    write_workflow(dense, _DENSE.replace("= 64", "= 1024").replace("context_length = 16", "context_length = 128"))
    for stage in ("pretokenize", "train"):
        made = mlxflow(dense, "run", stage)
        assert made.returncode == 0, made.stderr
    text = _workflow(dense / "artifacts/train", _ADAPTERS["lora, bf16"], {"bits": 4, "group_size": 64})
    folders = _projects(tmp_path, text.replace("context_length = 16", "context_length = 128"))
    _kill_one_and_compare(*folders, cache=tmp_path / "cache")
    kernels = [tomllib.loads((folder / "artifacts/train/report.toml").read_text())["kernels"] for folder in folders]
    assert kernels[0] == kernels[1]
    assert any(name.startswith("quantized_product/") for name in kernels[1])


def _projects(place: Path, text: str) -> list[Path]:
    """Return two projects of a workflow with their tokens and quantized model."""
    folders = [place / kind for kind in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
        write_workflow(folder, text)
        for stage in ("pretokenize", "quantize:q"):
            made = mlxflow(folder, "run", stage)
            assert made.returncode == 0, made.stderr
    return folders


def _kill_one_and_compare(whole: Path, killed: Path, *, cache: Path) -> None:
    """Train in both projects, one of them killed after a checkpoint, and compare the weights.

    Args:
        whole: trained at once.
        killed: trained until a checkpoint, and then to the end.
        cache: the user's cache of the training that is killed.
    """
    assert mlxflow(whole, "run", "train").returncode == 0
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "mlxflow", "run", "train"]
    with subprocess.Popen(command, cwd=killed, stderr=subprocess.DEVNULL, env=environment) as process:
        end = time.monotonic() + 120
        while not list(killed.glob("artifacts/.mlxflow/unfinished/train/*/step-*/state.json")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    again = mlxflow(killed, "run", "train")
    assert again.returncode == 0, again.stderr
    assert "resumes from step" in again.stderr
    assert _digest(killed) == _digest(whole)
