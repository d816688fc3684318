import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from mlxflow.distributed import launcher
from mlxflow.distributed.heartbeat import Beat
from mlxflow.distributed.hosts import Host, Hostfile
from mlxflow.distributed.launcher import Launch, RankProcess
from mlxflow.distributed.running_rank import RunningRank
from mlxflow.messages.errors import WorkflowError
from mlxflow.storage.regular_files import open_log

SHOWS_ITS_VARIABLES = """
import json, os, sys
names = ("MLX_RANK", "MLX_WORLD_SIZE", "NCCL_HOST_IP", "NCCL_PORT", "CUDA_VISIBLE_DEVICES", "MLXFLOW_RANK")
found = {name: os.environ[name] for name in names if name in os.environ}
if "MLX_HOSTFILE" in os.environ:
    with open(os.environ["MLX_HOSTFILE"]) as file:
        found["hosts"] = json.load(file)
if "MLXFLOW_MEETING" in os.environ:
    with open(os.environ["MLXFLOW_MEETING"]) as file:
        found["meeting"] = json.load(file)
print(json.dumps(found))
print(sys.stdin.read(), end="")
"""


def _launch(tmp_path: Path, backend: str, hosts: Hostfile | None = None) -> Launch:
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    command = (sys.executable, "-c", SHOWS_ITS_VARIABLES)
    return Launch(command, b"given", 2, backend, "fast", False, False, logs, open_log, 0, hosts, None)


def _start(launch: Launch, ranks: list[RunningRank]) -> None:
    with ExitStack() as held:
        launcher.start_ranks(launch, ranks, held, stop_requested=lambda: False, start=RankProcess)


def _output_of(tmp_path: Path, launch: Launch, number: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what a rank of two prints: its variables, and its standard input."""
    ports = iter([7001, 7002])
    monkeypatch.setattr(launcher, "free_ports", lambda count, *address: [next(ports) for _ in range(count)])
    ranks: list[RunningRank] = []
    _start(launch, ranks)
    for rank in ranks:
        assert rank.beat == Beat()
        while rank.pipes:
            for pipe in tuple(rank.pipes):
                rank.read(pipe)
        rank.end()
        assert rank.exit_code == 0
        assert not rank.is_stopped
        rank.close()
    return launch.logs[number].read_text().splitlines()


def test_a_rank_of_ring_gets_the_addresses_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, given = _output_of(tmp_path, _launch(tmp_path, "ring"), 1, monkeypatch)
    assert json.loads(variables) == {
        "MLX_RANK": "1",
        "MLX_WORLD_SIZE": "2",
        "MLXFLOW_RANK": "1 2 ring fast 2  00 0",
        "hosts": [["127.0.0.1:7001"], ["127.0.0.1:7002"]],
    }
    assert given == "given"


def test_output_is_printed_with_the_first_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _output_of(tmp_path, _launch(tmp_path, "ring"), 0, monkeypatch)
    assert capfd.readouterr().err == ""
    beats = "import os, json; os.write(int(os.environ['MLXFLOW_BEATS_FD']), b'{\"beat\": [0, \"x\", false, false]}\\n')"
    launch = _launch(tmp_path, "ring")._replace(command=(sys.executable, "-c", f"print(1, flush=True); {beats}"))
    _output_of(tmp_path, launch, 0, monkeypatch)
    assert sorted(capfd.readouterr().err.splitlines()) == ["rank 0: 1", "rank 1: 1"]


def test_a_rank_of_nccl_gets_a_gpu_and_a_meeting_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {
        "MLX_RANK": "1",
        "MLX_WORLD_SIZE": "2",
        "MLXFLOW_RANK": "1 2 nccl fast 1  00 0",
        "NCCL_HOST_IP": "127.0.0.1",
        "NCCL_PORT": "7001",
    }
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launch = _launch(tmp_path, "nccl")
    found = json.loads(_output_of(tmp_path, launch, 1, monkeypatch)[0])
    *place, key = found.pop("meeting")
    assert (place, len(key)) == ([1, "127.0.0.1", 7002], 32)
    assert found == expected | {"CUDA_VISIBLE_DEVICES": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    found = json.loads(_output_of(tmp_path, launch, 1, monkeypatch)[0])
    assert found.pop("meeting")[-1] != key
    assert found == expected | {"CUDA_VISIBLE_DEVICES": "6"}


def test_ranks_of_a_hostfile_get_its_addresses_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Host(1, "localhost", ("127.0.0.1",))
    hosts = Hostfile("hosts.json", (here, here), "", (("NCCL_PORT", "mine"),))
    variables = json.loads(_output_of(tmp_path, _launch(tmp_path, "ring", hosts), 0, monkeypatch)[0])
    assert variables["hosts"] == [["127.0.0.1:7001"], ["127.0.0.1:7002"]]
    assert variables["NCCL_PORT"] == "mine"


def test_the_first_host_is_this_machine(tmp_path: Path) -> None:
    hosts = Hostfile("hosts.json", (Host(1, "mac-b", ("10.0.0.2",)), Host(2, "localhost", ("127.0.0.1",))))
    with pytest.raises(WorkflowError, match=r"^hosts\.json:1: entry 1: ssh = mac-b: expected this machine, "):
        _start(_launch(tmp_path, "ring", hosts), [])


def test_an_address_of_another_machine_is_named(tmp_path: Path) -> None:
    here = Host(3, "localhost", ("192.0.2.1",))
    launch = _launch(tmp_path, "ring", Hostfile("h.json", (here, here)))
    with pytest.raises(WorkflowError, match=r"^h\.json:3: entry 1: ips: cannot be used on this machine \("):
        _start(launch, [])


def test_a_rank_that_cannot_be_started_leaves_no_descriptor(tmp_path: Path) -> None:
    launch = _launch(tmp_path, "ring")._replace(command=("/missing",))
    counts = []
    for _ in range(2):  # the first start opens a pipe that is kept
        with pytest.raises(FileNotFoundError):
            _start(launch, [])
        counts.append(len(os.listdir("/dev/fd")))  # noqa: PTH208
    assert counts[0] == counts[1]
