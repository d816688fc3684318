from pathlib import Path

import pytest

from mlxflow.distributed import backends
from mlxflow.distributed.table import Distributed
from mlxflow.messages.errors import WorkflowError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder in which a machine lists its GPUs: two."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(backends, "_GPUS", tmp_path)
    monkeypatch.setattr(backends, "may_have_gpu", lambda: True)
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    return tmp_path


def test_auto_is_nccl_where_a_gpu_may_be_used(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Distributed(processes=2)
    assert backends.resolve_backend(table, "auto") == backends.resolve_backend(table, "gpu") == "nccl"
    assert backends.resolve_backend(table, "cpu") == "ring"
    assert backends.resolve_backend(Distributed(backend="ring"), "auto") == "ring"
    assert backends.describe_ranks(table, "cpu") == "2 ranks (ring)"
    monkeypatch.setattr(backends, "may_have_gpu", lambda: False)
    assert backends.resolve_backend(table, "auto") == "ring"


def test_every_rank_of_nccl_needs_a_gpu(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends.require_gpus(Distributed(processes=2), "nccl")
    backends.require_gpus(Distributed(processes=9), "ring")
    with pytest.raises(WorkflowError) as caught:
        backends.require_gpus(Distributed(processes=3), "nccl")
    assert str(caught.value) == (
        "workflow.distributed.processes = 3: the backend nccl needs an NVIDIA GPU for each, and 2 can be used here. "
        'Set it to 2, or set workflow.distributed.backend = "ring".'
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(WorkflowError, match=r" 1 can be used here\. Remove it, or set "):
        backends.require_gpus(Distributed(processes=2), "nccl")
