"""Trainings on two network namespaces, which a link of their own connects."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.conftest import FIXED, WORKFLOW, Alone, Build
from tests.distributed.network import Namespaces, namespaces
from tests.distributed.ssh_server import serving

pytestmark = pytest.mark.faults


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Namespaces]:
    """Return two namespaces, the second with an sshd that is reached as otherhost."""
    with (
        namespaces() as both,
        serving(tmp_path / "ssh", "otherhost", address=both.addresses[1], inside=both.inside(1)) as programs,
    ):
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        yield both


def _start(network: Namespaces, *, num_steps: int) -> "subprocess.Popen[str]":
    hosts = [{"ssh": name, "ips": [ip]} for name, ip in zip(("localhost", "otherhost"), network.addresses, strict=True)]
    Path("hosts.json").write_text(json.dumps(hosts))
    table = f'hosts = "hosts.json"\npython = "{sys.executable}"'
    text = WORKFLOW.format(distributed=table, train=FIXED).replace("num_steps = 12", f"num_steps = {num_steps}")
    Path("workflow.toml").write_text(text)
    command = [*network.inside(0), sys.executable, "-m", "mlxflow", "run", "train"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_two_hosts_end_in_the_bytes_of_one(trained_alone: Alone, train: Build, network: Namespaces) -> None:
    assert _start(network, num_steps=12).communicate(timeout=300)[1]
    assert Path("artifacts/train/model.safetensors").read_bytes() == trained_alone[1]


def test_a_link_that_is_cut_in_mid_step_and_comes_back_changes_no_byte(train: Build, network: Namespaces) -> None:
    assert _start(network, num_steps=200).communicate(timeout=600)[1]
    model = Path("artifacts/train/model.safetensors")
    expected = model.read_bytes()
    model.unlink()
    supervisor = _start(network, num_steps=200)
    assert supervisor.stderr
    unfinished = Path("artifacts/.mlxflow/unfinished/train")
    until = time.monotonic() + 120
    while not list(unfinished.glob("*/step-*")) and time.monotonic() < until:
        time.sleep(0.05)
    network.set_link("down")
    said = []
    with supervisor:
        for line in supervisor.stderr:
            said.append(line)
            if re.match(r"train: rank \d( on otherhost)? (was lost|lost the connection|made no progress)", line):
                network.set_link("up")
    assert supervisor.returncode == 0, "".join(said)
    assert sum("(restart 1 of 3)" in line for line in said) == 1
    assert any("train: resumes from step" in line for line in said)
    assert model.read_bytes() == expected
