from pathlib import Path

import pytest

from mlxflow.messages.errors import WorkflowError
from mlxflow.workflow.disk_queries import unchanged
from mlxflow.workflow.loader import load_workflow

TEXT = """
[workflow]
device = "cpu"
[workflow.distributed]
hosts = "hosts.json"
[pretokenize]
[train]
grad_accum_steps = 2
dynamic_batch_size = false
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("workflow.toml").write_text(TEXT)
    Path("hosts.json").write_text('[{"ssh": "localhost", "ips": ["::1"]}, {"ssh": "b", "ips": ["10.0.0.2"]}]')
    return Path("workflow.toml")


def test_a_hostfile_has_a_rank_for_each_entry(path: Path) -> None:
    workflow = load_workflow(path)
    assert (workflow.ranks.number, workflow.ranks.number_here, workflow.ranks.backend) == (2, 1, "ring")
    assert [one.node().ranks for one in workflow.stages] == ["", "2 ranks on 2 hosts (ring)"]
    with_hosts = [one.settings() for one in workflow.stages]
    path.write_text(TEXT.replace('hosts = "hosts.json"', ""))
    assert [one.settings() for one in load_workflow(path).stages] == with_hosts


def test_an_edit_of_the_hostfile_is_noticed(path: Path) -> None:
    lookups = load_workflow(path).disk.lookups
    assert unchanged(Path(), lookups)
    Path("hosts.json").write_text('[{"ssh": "localhost", "ips": ["::1"]}]')
    assert not unchanged(Path(), lookups)


def test_mistakes_of_table_and_hostfile_come_together(path: Path) -> None:
    path.write_text(TEXT.replace('"hosts.json"', '"hosts.json"\nrestarts = -1'))
    with pytest.raises(WorkflowError, match="restarts"):
        load_workflow(path)
    path.write_text(TEXT.replace("dynamic", "num_step = 1\ndynamic"))
    Path("hosts.json").write_text('[{"ssh": "localhost"},\n {"sh": "b", "ips": ["10.0.0.2"]}]')
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path)
    assert caught.value.problems == (
        'hosts.json:2: entry 2: sh = "b": unknown key. Expected ssh, ips and rdma.',
        'hosts.json:2: entry 2: ssh: missing. Add the name for "ssh".',
        "workflow.toml: train.num_step: unknown key. Did you mean train.num_steps?",
    )
    path.write_text(TEXT)
    Path("hosts.json").write_text('[{"ssh": "localhost"}]')
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path)
    assert caught.value.problems == (
        'hosts.json:1: entry 1: ips: missing, and backend "ring" needs an address of localhost. Add "ips".',
    )


def test_a_missing_hostfile_more_entries_than_passes_and_two_ways_to_name_ranks_are_refused(path: Path) -> None:
    entries = ", ".join(f'{{"ssh": "b{number}", "ips": ["10.0.0.{number}"]}}' for number in range(1, 4))
    Path("hosts.json").write_text(f"[{entries}]")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path)
    assert caught.value.problems == (
        'workflow.toml: workflow.distributed.hosts = "hosts.json": 3 entries: expected at most 2, the forward passes '
        "in an update of train. Remove entries, or raise train.grad_accum_steps.",
    )
    path.write_text(TEXT.replace("hosts.json", "missing.json"))
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path)
    assert caught.value.problems == (
        'workflow.toml: workflow.distributed.hosts = "missing.json": cannot be read (No such file or directory). Name '
        "a hostfile of mlx.distributed_config.",
    )
    path.write_text(TEXT.replace('"hosts.json"', '"hosts.json"\nprocesses = 2'))
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path)
    assert caught.value.problems == (
        "workflow.toml: workflow.distributed.processes = 2: hosts has an entry for each rank. Remove one of the two.",
    )
