"""What a stage runs with is fixed when doit decides: no edit during a run leads to a record that is wrong."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxflow.__main__ import main
from mlxflow.device.child_processes import PARENT_VARIABLE
from mlxflow.messages.errors import StageError
from mlxflow.report.stage_reports.train import TrainReport
from mlxflow.stages import train
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.locks import hold
from mlxflow.storage.report_files import read_report
from mlxflow.storage.run_context import Context
from mlxflow.tasks.graph import load_nodes
from mlxflow.workflow.execution import execute_stage
from mlxflow.workflow.loader import load_workflow
from mlxflow.workflow.staleness import observe_inputs, observe_settings
from tests.conftest import doit, write_workflow

WORKFLOW = """
[pretokenize]
sources = ["notes"]
context_length = 16
tokenizer = { vocab_size = 300 }
[train]
num_steps = 2
batch_size = 4
model = { hidden_size = 32, num_layers = 1 }
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_workflow(tmp_path, WORKFLOW).parent


@contextmanager
def stopped_in_pretokenize(project: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `doit train`, which stops after pretokenize has found its files, until the block ends."""
    command = [sys.executable, "-m", "doit", "train"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(project / "cache")}
    pipe = subprocess.PIPE
    with hold(project / "artifacts/.mlxflow/shards/lock", "", wait=True):
        process = subprocess.Popen(command, cwd=project, stdout=pipe, stderr=pipe, text=True, env=environment)
        assert process.stderr is not None
        assert process.stderr.readline().startswith("pretokenize: waits for the shards")
        yield process


def test_edits_of_the_workflow_file_and_new_sources_during_a_run_change_nothing_of_it(project: Path) -> None:
    path, new = project / "workflow.toml", project / "notes/new.txt"
    with stopped_in_pretokenize(project) as process:
        path.write_text(WORKFLOW.replace("num_steps = 2", "num_steps = 1").replace("16", "32"))
        new.write_text("a new note")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert read_report(project / "artifacts/train/report.toml")["steps"] == 2
    assert "new.txt" not in (project / "artifacts/pretokenize/files.txt").read_text()
    planned = doit(project, "plan", "train").stdout
    assert "pretokenize: pretokenize.context_length: 16 -> 32; source notes/new.txt is new " in planned
    assert "train: train.num_steps: 2 -> 1; because pretokenize runs " in planned
    path.write_text(WORKFLOW)
    new.unlink()
    assert doit(project, "plan", "train").stdout == "nothing to do: 2 stages are fresh\n"


@pytest.mark.parametrize("content", [b"edited", b"\0binary"])
def test_a_source_edited_and_restored_during_a_run_leaves_no_record(tmp_path: Path, content: bytes) -> None:
    skips = WORKFLOW.replace("[pretokenize]", '[pretokenize]\non_bad_record = "skip"')
    project = write_workflow(tmp_path, skips).parent
    source = project / "notes/03.txt"
    text = source.read_text()
    with stopped_in_pretokenize(project) as process:
        source.write_bytes(content)
    _, err = process.communicate()
    line = "notes/03.txt: changed while it was read. Run the stage again."
    assert (process.returncode, err.splitlines()[-1]) == (2, line)
    source.write_text(text)
    result = doit(project, "run", "pretokenize")
    assert result.returncode == 0, result.stderr
    report = read_report(project / "artifacts/pretokenize/report.toml")
    assert report["train"]["documents"] + report["validation"]["documents"] == 20


def _run_with_handover(project: Path, edit: Callable[[Path], object]) -> tuple[int, str]:
    """Run pretokenize with what doit found before an edit of a note; return its exit code and what it printed."""
    node = next(one for one in load_nodes(project / "workflow.toml", project / "none") if one.task == "pretokenize")
    cache = DigestCache(project / "none")
    handover = node.handover(observe_settings(node), observe_inputs(node, cache))
    edit(project / "notes/03.txt")
    reading, writing = os.pipe()
    result = subprocess.run(
        node.command,
        input=handover,
        capture_output=True,
        check=False,
        pass_fds=(reading,),
        env={**os.environ, PARENT_VARIABLE: str(reading)},
    )
    os.close(reading)
    os.close(writing)
    return result.returncode, result.stderr.decode()


def test_a_source_edited_after_the_staleness_check_is_not_read(project: Path) -> None:
    line = "notes/03.txt: changed since the build checked it for pretokenize. Build again.\n"
    assert _run_with_handover(project, lambda path: path.write_bytes(b"edited")) == (1, line)
    assert not (project / "artifacts/pretokenize").exists()


@pytest.mark.parametrize("puts_back", [False, True])
def test_an_input_changed_while_a_stage_runs_publishes_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, puts_back: bool
) -> None:
    monkeypatch.chdir(project)
    assert main(["run", "pretokenize"]) == 0
    read = project / "artifacts/pretokenize/tokenizer_config.json"
    begun: list[Path] = []

    def run(*, context: Context, **arguments: Any) -> TrainReport:
        report = real(context=context, **arguments)
        context.unfinished.mkdir(parents=True, exist_ok=True)  # as a checkpoint leaves it
        begun.append(context.unfinished)
        text = read.read_text()
        read.write_text("{}")
        if puts_back:
            read.write_text(text)
        return report

    real = train.run
    monkeypatch.setattr(train, "run", run)
    workflow = load_workflow(Path("workflow.toml"))
    with pytest.raises(StageError) as caught:
        execute_stage(workflow, workflow.find("train"))
    name = "artifacts/pretokenize/tokenizer_config.json"
    assert str(caught.value) == f"{name}: changed while train ran, so its result is not kept. Run it again."
    assert not (project / "artifacts/train").exists()
    assert not begun[0].exists()  # nobody goes on from what was trained on other tokens
