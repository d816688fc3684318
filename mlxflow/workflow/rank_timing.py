"""The speed of a training on one process and on the workflow's ranks: a few updates of the stage itself, in turns."""

import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from mlxflow.device import child_processes, compute_device
from mlxflow.messages.errors import StageError
from mlxflow.storage import layout, report_files
from mlxflow.storage.run_context import RankSpeed
from mlxflow.workflow.disk_queries import Disk
from mlxflow.workflow.handover import Basis, Handover
from mlxflow.workflow.loader import load_workflow, resolved_toml
from mlxflow.workflow.model import Workflow

# What a short training leaves out: it saves and validates as little as it can, and keeps its batch size
_SHORT = {
    "num_epochs": "auto",
    "warmup_steps": "auto",
    "decay_steps": "auto",
    "eval_every": 0,
    "save_every": 0,
    "adjust_every": 10**9,
    "max_validation_rows": 8,
    "patience": 0,
    "keep": "last",
    "require_improvement": False,
    "replay": "",
}


def time_ranks(workflow: Workflow, task: str, num_steps: int) -> tuple[RankSpeed, ...]:
    """Return the speed of a training on one process and on all ranks; empty if the workflow has one rank.

    Each is started twice, in the order one, all, all, one, so that a drift of the machine affects both alike.

    Args:
        workflow: the workflow.
        task: a stage that trains.
        num_steps: updates of each start.

    Raises:
        StageError: a training failed.
    """
    ranks = workflow.find(task).ranks
    if ranks < 2:
        return ()
    found: dict[int, list[Mapping[str, Any]]] = {1: [], ranks: []}
    for number in (1, ranks, ranks, 1):
        found[number].append(_run(workflow, task, num_steps, is_alone=number == 1))
    return tuple(
        RankSpeed(
            ranks=number,
            backend=workflow.ranks.backend if number > 1 else "",
            tokens_per_second=statistics.mean(run["tokens_per_second"] for run in runs),
            waited_seconds=tuple(map(statistics.mean, zip(*(run.get("rank_waited_seconds", ()) for run in runs)))),  # noqa: B905
        )
        for number, runs in found.items()
    )


def short_workflow(workflow: Workflow, task: str, num_steps: int, *, is_alone: bool) -> str:
    """Return the text of a workflow file whose training is short and otherwise the same.

    Args:
        workflow: the workflow.
        task: a stage that trains.
        num_steps: updates.
        is_alone: whether it trains on one process.
    """
    document = tomllib.loads(resolved_toml(workflow))
    if is_alone:
        document["workflow"]["distributed"] |= {"processes": 1, "hosts": ""}
    document["workflow"]["stages"] = [task]
    name, _, variant = task.partition(":")
    tables = document[name] if isinstance(document[name], list) else [document[name]]
    for table in tables:
        if table.get("name", "") == variant:
            table |= _SHORT | {"num_steps": num_steps, "log_every": num_steps, "max_batch_size": table["batch_size"]}
    return tomli_w.dumps(document)


def _run(workflow: Workflow, task: str, num_steps: int, *, is_alone: bool) -> Mapping[str, Any]:
    """Train for a few updates in a temporary folder, and return the table `run` of the report."""
    text = short_workflow(workflow, task, num_steps, is_alone=is_alone)
    short = load_workflow(workflow.path, Disk(workflow.root, workflow.disk.lookups), text.encode())
    stage = short.find(task)
    settings = stage.settings() | compute_device.environment(stage.bound_device)
    data = Handover(Basis(text, short.disk.lookups), settings, None).as_bytes()
    with (
        tempfile.TemporaryDirectory(".partial", "rank-speed-", workflow.state) as folder,
        tempfile.TemporaryFile() as given,
    ):
        given.write(data)
        given.seek(0)
        into = Path(folder) / "artifact"
        command = [sys.executable, "-P", "-m", "mlxflow", "run", task, f"--workflow={workflow.path}", f"--into={into}"]
        process = child_processes.start(command, stdin=given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = process.communicate()[1].decode(errors="backslashreplace")
        if process.returncode:
            last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
            words = "on one process" if is_alone else "on all ranks"
            raise StageError(f"{task}: {num_steps} updates {words}, for their speed, failed: {last}")
        return dict(report_files.read_report(into / layout.REPORT)["run"])
