"""Trainings on two NVIDIA GPUs through NCCL: `pytest -m gpu -k two_gpus -n 0 tests/distributed`, minutes.

Where there is one GPU, both ranks use it and exchange over loopback, which is slow (`one_gpu/sitecustomize.py`).

On a GPU a product that is added within one kernel is rounded once, so that the sums of one process and those of ranks
may differ in their last bits; two runs of the same number of ranks have the same bytes. Which kernels are used depends
on trials of their speed, so all trainings of this module share one cache of these.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from mlxflow.distributed import supervisor
from mlxflow.distributed.backends import count_gpus
from tests.conftest import write_notes
from tests.distributed import conftest
from tests.distributed.conftest import FIXED, Build, Faults

Alone = tuple[Path, bytes]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(count_gpus() < 1, reason="needs an NVIDIA GPU, or two"),
]

# With AdamW's epsilon a weight whose gradient is near 0 takes a whole step into the direction of a rounding error
_SETTINGS = f'{FIXED}\nprecision = "fp32"\noptimizer_options = {{ eps = 1e-2 }}\n'
# Else MLX rounds the factors of fp32 products to TF32 on CUDA: 2^-11 of a factor, wherever its last bits differ
_EXACT_PRODUCTS = {"MLX_ENABLE_TF32": "0"}
_STEP_SECONDS = 60  # the deadline of a step, within which the ranks must be ended and started again

_WORKFLOW = (
    conftest.WORKFLOW.replace('device = "cpu"', 'device = "gpu"')
    .replace("hidden_size = 32", "hidden_size = 256")
    .replace("intermediate_size = 32", "intermediate_size = 512")
    .replace("context_length = 16", "context_length = 64")
)


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Return a project with tokens, and the bytes of the model that one process trains on one GPU."""
    folder = tmp_path_factory.mktemp("alone") / "project"
    folder.mkdir()
    environment = os.environ | _EXACT_PRODUCTS | {"XDG_CACHE_HOME": str(_cache(folder))}
    write_notes(folder / "notes")
    (folder / "workflow.toml").write_text(_WORKFLOW.format(distributed="", train=_SETTINGS))
    for stage in ("pretokenize", "train"):
        command = [sys.executable, "-m", "mlxflow", "run", stage]
        subprocess.run(command, cwd=folder, check=True, env=environment)
    return folder, (folder / "artifacts/train/model.safetensors").read_bytes()


def _cache(project: Path) -> Path:
    """Return the folder of the user's caches beside a project."""
    folder = project.parent / "cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture
def train_on_two_gpus(train: Build, trained_alone: Alone, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Return a function that trains on two ranks, of a GPU each, and returns the bytes of the model."""
    monkeypatch.setattr(conftest, "WORKFLOW", _WORKFLOW)
    environment = _EXACT_PRODUCTS | {"XDG_CACHE_HOME": str(_cache(trained_alone[0]))}
    if count_gpus() == 1:
        shared = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
        places = [str(Path(__file__).with_name("one_gpu")), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment |= {
            "SHARED_GPU": shared,
            "CUDA_VISIBLE_DEVICES": f"{shared},none",  # of this process the first, as CUDA stops at an unknown name
            "PYTHONPATH": os.pathsep.join(filter(None, places)),
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_IB_DISABLE": "1",
        }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def build(processes: int = 2, **distributed: Any) -> bytes:
        shutil.rmtree("artifacts/train", ignore_errors=True)
        model = train(processes, train=distributed.pop("train", _SETTINGS), backend='"nccl"', **distributed)
        assert "nccl" in Path("artifacts/train/report.toml").read_text()
        return model

    return build


def _require_close(what: str, model: bytes, expected: bytes) -> None:
    """Check that tensors differ by rounding only: by their norm, since AdamW takes whole steps for gradients near 0."""
    found, others = safetensors.numpy.load(model), safetensors.numpy.load(expected)
    assert found.keys() == others.keys()
    norms = {name: np.linalg.norm(found[name] - one) / np.linalg.norm(one) for name, one in others.items()}
    most = max(np.abs(found[name] - one).max() / np.abs(one).max() for name, one in others.items())
    print(f"two GPUs: {what}: tensors differ from one GPU's by {max(norms.values()):.1e} of their norm,")
    print(f"two GPUs: {what}: a weight by {most:.1e} of its tensor's largest")
    assert {name: value for name, value in norms.items() if value > 1e-6} == {}


def test_two_gpus_end_in_the_same_bytes_after_a_rank_was_killed_and_one_was_stopped(
    trained_alone: Alone,
    train_on_two_gpus: Build,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    undisturbed = train_on_two_gpus()
    started = faults.starts
    # no clock for the stopped rank: the first step compiles kernels, and may last longer than a short deadline
    monkeypatch.setattr(supervisor._Watch, "_is_late", lambda watch, rank, waiting: rank.is_stopped)
    faults.planned = {(1, 4): (signal.SIGKILL, "rank"), (0, 8): (signal.SIGSTOP, "rank")}
    model = train_on_two_gpus(step_timeout=f'"{_STEP_SECONDS} s"')
    said = [line for line in capfd.readouterr().err.splitlines() if re.match("train: rank [01] (ended|made)", line)]
    assert len(said) == 2
    assert re.match(r"train: rank 1 ended with signal SIGKILL at step \d+ \(", said[0])
    assert re.match(r"train: rank 0 made no progress for 60 s at step \d+ \(.*and is stopped", said[1])
    waits = [again - struck for struck, again in zip(faults.struck_at, faults.started_at[started + 1 :], strict=True)]
    print("two GPUs: from the signal to the next start:", ", ".join(f"{wait:.1f} s" for wait in waits))
    assert max(waits) < _STEP_SECONDS
    assert model == undisturbed
    print("two GPUs: ordered sums: the bytes of one GPU:", model == trained_alone[1])
    _require_close("ordered sums", model, trained_alone[1])


@pytest.mark.parametrize("reduction", ["ordered", "fast"])
def test_two_gpus_with_a_sharded_optimizer_learn_what_one_does(
    trained_alone: Alone, train_on_two_gpus: Build, reduction: str
) -> None:
    model = train_on_two_gpus(optimizer_sharding="true", reduction=f'"{reduction}"')
    _require_close(f"optimizer_sharding, {reduction}", model, trained_alone[1])


@pytest.mark.parametrize("checkpointing", ["none", "layers"])
def test_two_gpus_with_split_layers_learn_what_one_does(
    trained_alone: Alone, train_on_two_gpus: Build, faults: Faults, checkpointing: str
) -> None:
    if checkpointing == "layers":
        faults.planned = {(0, 5): (signal.SIGKILL, "rank")}
    settings = f'{_SETTINGS}checkpointing = "{checkpointing}"\n'
    model = train_on_two_gpus(train=settings, sharding='"full"', reduction='"fast"')
    _require_close(f"split layers, checkpointing {checkpointing}", model, trained_alone[1])


def test_two_gpus_with_split_frozen_layers_learn_what_one_does(
    trained_alone: Alone, train_on_two_gpus: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _WORKFLOW.partition("[train.model]")[0] + '[train.model]\nfrom = "base"\n'
    monkeypatch.setattr(conftest, "WORKFLOW", text)
    shutil.copytree(trained_alone[0] / "artifacts/train", "base")
    settings = f'{_SETTINGS}method = "lora"\n'
    Path("workflow.toml").write_text(text.format(distributed="", train=settings))
    subprocess.run([sys.executable, "-m", "mlxflow", "run", "train"], check=True)
    alone = Path("artifacts/train/model.safetensors").read_bytes()
    model = train_on_two_gpus(train=settings, sharding='"full"')
    _require_close("adapters beside split layers", model, alone)
