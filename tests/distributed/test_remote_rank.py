"""Ranks on another host, through a real sshd on this machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxflow.distributed import launcher, remote_rank
from mlxflow.distributed import supervisor as supervising
from mlxflow.distributed.rank_start import free_ports
from mlxflow.distributed.remote_rank import RemoteRank
from mlxflow.messages.errors import StageError
from mlxflow.workflow import remote_agent
from tests.conftest import rest_in_matrix
from tests.distributed.conftest import Alone, Build, Faults
from tests.distributed.ssh_server import serving
from tests.distributed.test_mpi_meeting import needs_mpi

HOSTS: list[dict[str, Any]] = [
    {"ssh": "localhost", "ips": ["127.0.0.1"]},
    {"ssh": "otherhost", "ips": ["127.0.0.2"]},
]


@pytest.fixture
def other_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Reach this machine through ssh as otherhost, with the folder of its caches; return that folder."""
    try:
        free_ports(1, HOSTS[1]["ips"][0])
    except OSError as error:
        pytest.skip(f"needs a second address of this machine, {HOSTS[1]['ips'][0]} ({error.strerror})")
    cache = tmp_path / "other-cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("OPENBLAS_CORETYPE", os.environ.get("OPENBLAS_CORETYPE", ""))
    with serving(tmp_path / "ssh", "otherhost") as programs:
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        yield cache


@pytest.fixture
def train_on_hosts(train: Build, other_host: Path, tmp_path: Path) -> Callable[..., bytes]:
    """Return a function that trains on this host and the other one."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nXDG_CACHE_HOME={other_host} exec {sys.executable} "$@"\n')
    python.chmod(0o755)

    def build(hosts: object = HOSTS, **distributed: object) -> bytes:
        Path("hosts.json").write_text(json.dumps(hosts))
        keys = {"hosts": '"hosts.json"', "python": f'"{python}"'} | distributed
        return train(1, **keys)

    return build


def _copy_of(cache: Path) -> Path:
    (folder,) = (cache / "mlxflow/remote").iterdir()
    return folder


def test_a_rank_on_another_host_gets_the_files_and_trains_the_same_bytes(
    trained_alone: Alone,
    train_on_hosts: Callable[..., bytes],
    other_host: Path,
    faults: Faults,
    capfd: pytest.CaptureFixture[str],
) -> None:
    faults.planned = {(1, 7): (signal.SIGKILL, "rank")}
    assert train_on_hosts() == trained_alone[1]
    said = capfd.readouterr().err
    assert re.search(r"^rank 1 on otherhost: copies \d+ files, [\d.]+ [kM]B$", said, re.M)
    ended = re.search(
        r"^train: rank 1 on otherhost ended with signal SIGKILL at step (\d+) \(.*restart 1 of 3\)$", said, re.M
    )
    resumed = re.search(r"^rank 0: train: resumes from step (\d+) \(", said, re.M)
    assert ended is not None
    assert resumed is not None
    # from a checkpoint, one of every second step; the signal strikes when the supervisor hears of step 7, or later
    assert int(ended[1]) - 4 <= int(resumed[1]) <= int(ended[1])
    assert int(resumed[1]) in (4, 6, 8, 10)
    names = {path.name for path in _copy_of(other_host).rglob("*") if path.is_file()}
    assert {"train.safetensors", "tokenizer.json", "state.safetensors"} <= names


@needs_mpi
@pytest.mark.faults
def test_ranks_of_mpi_on_two_hosts_train_the_same_bytes(
    trained_alone: Alone,
    train_on_hosts: Callable[..., bytes],
    other_host: Path,
    faults: Faults,
    capfd: pytest.CaptureFixture[str],
) -> None:
    faults.planned = {(1, 7): (signal.SIGKILL, "rank")}
    assert train_on_hosts(backend='"mpi"') == trained_alone[1]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train: rank")]
    assert len(said) == 1
    assert said[0].startswith("train: rank 1 on otherhost ended with signal SIGKILL")
    assert 'backend = "mpi"' in Path("artifacts/train/report.toml").read_text()
    assert not psutil.wait_procs(_processes_with(other_host), timeout=30)[1]


def _processes_with(cache: Path) -> list[psutil.Process]:
    """Return the processes of the other host: those with its folder of caches."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("XDG_CACHE_HOME") == str(cache) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("number", "code"),
    rest_in_matrix(
        [(signal.SIGKILL, -9), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)], (signal.SIGKILL, -9)
    ),
)
def test_no_process_is_left_on_another_host_when_the_supervisor_is_ended(
    train_on_hosts: Callable[..., bytes], other_host: Path, number: signal.Signals, code: int
) -> None:
    Path("hosts.json").write_text(json.dumps(HOSTS))
    table = f'hosts = "hosts.json"\npython = "{other_host.parent}/python"'
    text = Path("workflow.toml").read_text().replace("num_steps = 12", "num_steps = 100000")
    Path("workflow.toml").write_text(text.replace("[workflow.distributed]", f"[workflow.distributed]\n{table}"))
    supervisor = subprocess.Popen([sys.executable, "-m", "mlxflow", "run", "train"])
    unfinished = Path("artifacts/.mlxflow/unfinished/train")
    until = time.monotonic() + 120
    while not list(unfinished.glob("*/step-*")) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(_processes_with(other_host)) >= 2  # the agent and the rank
    supervisor.send_signal(number)
    assert supervisor.wait(60) == code
    assert not psutil.wait_procs(_processes_with(other_host), timeout=30)[1]
    assert list(unfinished.glob("*/step-*"))


def _refusal(train_on_hosts: Callable[..., bytes], **distributed: object) -> str:
    with pytest.raises(StageError) as caught:
        train_on_hosts(**distributed)
    return str(caught.value)


def test_a_host_that_refuses_ssh_is_named_once(
    train_on_hosts: Callable[..., bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ssh/user_key.pub").write_text("")
    line = _refusal(train_on_hosts)
    assert re.fullmatch(
        r"train: rank 1 could not be started: ssh to otherhost failed: \S+ Permission denied \(publickey\)\. Check: "
        r"ssh -o BatchMode=yes otherhost true\. See artifacts/logs/train-rank-1\.log\.",
        line,
    )
    assert "\n" not in line
    assert capfd.readouterr().err == ""
    unknown = [HOSTS[0], HOSTS[1] | {"ssh": "no-such-host.invalid"}]
    line = _refusal(train_on_hosts, hosts=unknown)
    assert line.startswith("train: rank 1 could not be started: ssh to no-such-host.invalid failed: ssh: Could not ")


def test_a_python_without_mlxflow_is_named_once(
    train_on_hosts: Callable[..., bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = _refusal(train_on_hosts, python='"/missing/python"')
    assert line.startswith("train: rank 1 could not be started: mlxflow cannot be run on otherhost: ")
    assert line.endswith(
        "Set workflow.distributed.python to a Python with mlxflow on otherhost. See artifacts/logs/train-rank-1.log."
    )
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    bare.chmod(0o755)
    assert "No module named 'mlxflow'" in _refusal(train_on_hosts, python=f'"{bare}"')
    assert capfd.readouterr().err == ""


def test_a_host_with_another_version_or_other_code_is_named_once(
    train_on_hosts: Callable[..., bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = remote_agent.versions()
    other = tmp_path / "other"
    (other / "mlxflow-0.0.1.dist-info").mkdir(parents=True)
    (other / "mlxflow-0.0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mlxflow\nVersion: 0.0.1\n")
    python = tmp_path / "other-python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={other} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert _refusal(train_on_hosts, python=f'"{python}"') == (
        f"train: rank 1 could not be started: otherhost has mlxflow 0.0.1, and this host has mlxflow {own['mlxflow']}. "
        "Install the same there. See artifacts/logs/train-rank-1.log."
    )
    shutil.rmtree(other)
    package = Path(remote_rank.__file__).parents[1]
    shutil.copytree(package, other / "mlxflow", ignore=shutil.ignore_patterns("__pycache__", "*.so"), symlinks=False)
    with (other / "mlxflow/__init__.py").open("a") as file:
        file.write("\n# changed\n")
    line = _refusal(train_on_hosts, python=f'"{python}"')
    assert re.fullmatch(
        r"train: rank 1 could not be started: otherhost has code [0-9a-f]{12}, and this host has code [0-9a-f]{12}\. "
        r"Install the same there\. See artifacts/logs/train-rank-1\.log\.",
        line,
    )
    assert capfd.readouterr().err == ""


def test_an_address_that_another_host_has_not_is_named(train_on_hosts: Callable[..., bytes]) -> None:
    line = _refusal(train_on_hosts, hosts=[HOSTS[0], {"ssh": "otherhost", "ips": ["192.0.2.1"]}])
    assert line.startswith("train: rank 1 could not be started: otherhost: ips: 192.0.2.1 cannot be used there (")


@pytest.mark.faults
def test_a_stopped_rank_on_another_host_is_named_and_the_run_continues(
    trained_alone: Alone,
    train_on_hosts: Callable[..., bytes],
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(supervising._Watch, "_is_late", lambda watch, rank, waiting: rank.is_stopped)
    faults.planned = {(1, 5): (signal.SIGSTOP, "rank")}
    assert train_on_hosts() == trained_alone[1]
    assert re.search(
        r"^train: rank 1 on otherhost made no progress for 2 min at step 5 \(.*\) and is stopped.*restart 1 of 3\)$",
        capfd.readouterr().err,
        re.M,
    )


@pytest.mark.faults
def test_a_host_that_is_lost_in_mid_step_and_comes_back_changes_no_byte(
    trained_alone: Alone,
    train_on_hosts: Callable[..., bytes],
    other_host: Path,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(supervising, "_HOST_SECONDS", 0.1)

    class Lost(RemoteRank):
        def read(self, pipe: int) -> bool:
            is_alive = super().read(pipe)
            if self.beat.step >= 5 and not (other_host / "lost").exists():
                (other_host / "lost").touch()
                self.link.kill()
            return is_alive

    monkeypatch.setattr(launcher, "RemoteRank", Lost)
    assert train_on_hosts() == trained_alone[1]
    said = capfd.readouterr().err
    assert re.search(
        r"^train: rank 1 on otherhost was lost at step \d \(.*\): the connection was lost.*restart 1 of 3\)$",
        said,
        re.M,
    )
    assert not _processes_with(other_host)


def test_a_signal_while_ssh_connects_ends_the_run_at_once(
    train_on_hosts: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tmp_path / "ssh/bin/ssh"
    client.write_text(f"#!/bin/sh\nkill -TERM {os.getpid()}\nexec sleep 600\n")
    with pytest.raises(SystemExit) as caught:
        train_on_hosts()
    assert caught.value.code == 128 + signal.SIGTERM
    assert not [one for one in psutil.Process().children(recursive=True) if "sleep" in one.name()]
