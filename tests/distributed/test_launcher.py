import json
import os
import sys
from pathlib import Path

import pytest

from mlxflow.distributed import launcher
from mlxflow.distributed.heartbeat import Beat
from mlxflow.distributed.launcher import Launch, RankProcess, free_ports
from mlxflow.storage.regular_files import open_log

SHOWS_ITS_VARIABLES = """
import json, os, sys
names = ("MLX_RANK", "MLX_WORLD_SIZE", "NCCL_HOST_IP", "NCCL_PORT", "CUDA_VISIBLE_DEVICES", "MLXFLOW_RANK")
found = {name: os.environ[name] for name in names if name in os.environ}
if "MLX_HOSTFILE" in os.environ:
    with open(os.environ["MLX_HOSTFILE"]) as file:
        found["hosts"] = json.load(file)
print(json.dumps(found))
print(sys.stdin.read(), end="")
"""


def _output_of(tmp_path: Path, backend: str, number: int) -> list[str]:
    """Return what a rank of two prints: its variables, and its standard input."""
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    command = (sys.executable, "-c", SHOWS_ITS_VARIABLES)
    rank = RankProcess(Launch(command, b"given", 2, backend, "fast", logs, open_log, free_ports), number, [7001, 7002])
    assert rank.beat == Beat()
    while rank.pipes:
        for pipe in tuple(rank.pipes):
            rank.read(pipe)
    assert rank.process.wait() == 0
    assert not rank.is_stopped
    rank.close()
    return logs[number].read_text().splitlines()


def test_a_rank_of_ring_gets_the_addresses_of_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    variables, given = _output_of(tmp_path, "ring", 1)
    assert json.loads(variables) == {
        "MLX_RANK": "1",
        "MLX_WORLD_SIZE": "2",
        "MLXFLOW_RANK": "1 2 ring fast",
        "hosts": [["127.0.0.1:7001"], ["127.0.0.1:7002"]],
    }
    assert given == "given"
    assert capfd.readouterr().err == f"rank 1: {variables}\nrank 1: given\n"


def test_a_rank_of_nccl_gets_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {
        "MLX_RANK": "1",
        "MLX_WORLD_SIZE": "2",
        "MLXFLOW_RANK": "1 2 nccl fast",
        "NCCL_HOST_IP": "127.0.0.1",
        "NCCL_PORT": "7001",
    }
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert json.loads(_output_of(tmp_path, "nccl", 1)[0]) == expected | {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert json.loads(_output_of(tmp_path, "nccl", 1)[0]) == expected | {"CUDA_VISIBLE_DEVICES": "6"}


def test_free_ports_differ() -> None:
    assert len(set(free_ports(50))) == 50


def test_a_rank_that_cannot_be_started_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/dev/fd"))  # noqa: PTH208
    launch = Launch(("/missing",), b"", 1, "ring", "ordered", [tmp_path / "0.log"], open_log, free_ports)
    with pytest.raises(FileNotFoundError):
        launcher.RankProcess(launch, 0, [7001])
    assert len(os.listdir("/dev/fd")) == before  # noqa: PTH208
