"""Run a stage on several processes: this one supervises the ranks, and rank 0 writes the artifact."""

import os
import sys
from pathlib import Path

from mlxflow.device import compute_device
from mlxflow.distributed.backends import require_gpus, resolve_backend
from mlxflow.distributed.rank import Rank
from mlxflow.messages import terminal
from mlxflow.storage import atomic_folders, layout
from mlxflow.storage.regular_files import open_log
from mlxflow.workflow.handover import Basis, Handover
from mlxflow.workflow.model import Stage, Workflow


def run_ranks(workflow: Workflow, stage: Stage, into: Path | None, handover: Handover | None) -> None:
    """Run the ranks of a stage to the end.

    Args:
        workflow: the workflow.
        stage: one of its stages, which trains.
        into: the folder to write instead of the stage's own.
        handover: passed by doit; None if doit did not start this process.

    Raises:
        SystemExit: a signal ended the run.
        StageError: a rank failed more often than the ranks may start again.
        UserError: a rank found a mistake of the user.
    """
    from mlxflow.distributed.launcher import Launch, free_ports
    from mlxflow.distributed.supervisor import RestartLimits, supervise

    table = workflow.settings.distributed
    backend = resolve_backend(table, workflow.settings.device)
    require_gpus(table, backend)
    _advise_on_threads(workflow, backend)
    launch = Launch(
        command=_command(workflow, stage, into),
        data=(handover or _handover(workflow, stage)).as_bytes(),
        size=table.processes,
        backend=backend,
        reduction=table.reduction,
        logs=tuple(layout.log_file(workflow.root, f"{stage.task}:rank:{number}") for number in range(table.processes)),
        open_log=open_log,
        find_ports=free_ports,
    )
    atomic_folders.remove_folder(_ranks_folder(workflow, stage))
    try:
        supervise(stage.task, launch, RestartLimits(table.step_timeout, table.timeout_seconds, table.restarts))
    finally:
        atomic_folders.remove_folder(_ranks_folder(workflow, stage))


def join(rank: Rank) -> None:
    """Connect a rank with the others; they wait for each other, so every rank calls it at the same point of its start.

    Args:
        rank: the place of this process; one that runs alone connects with no one.

    Raises:
        JoinError: the ranks cannot connect.
    """
    if rank.size > 1:
        from mlxflow.distributed import team

        team.of_this_process()


def folder_of_rank(workflow: Workflow, stage: Stage, rank: Rank) -> Path:
    """Return the folder of a rank other than 0, which writes nothing that is kept."""
    return _ranks_folder(workflow, stage) / str(rank.number)


def _ranks_folder(workflow: Workflow, stage: Stage) -> Path:
    return workflow.state / layout.RANKS / stage.task.replace(":", "/")


def _command(workflow: Workflow, stage: Stage, into: Path | None) -> tuple[str, ...]:
    options = [f"--workflow={workflow.path}", *([f"--into={into}"] if into else [])]
    return (sys.executable, "-P", "-m", "mlxflow", "run", stage.task, *options)


def _handover(workflow: Workflow, stage: Stage) -> Handover:
    """Return the data by which every rank resolves the workflow that this process has read."""
    settings = stage.settings() | compute_device.environment(stage.bound_device)
    return Handover(Basis(workflow.text, workflow.disk.lookups), settings, None)


def _advise_on_threads(workflow: Workflow, backend: str) -> None:
    """Advise fewer threads for each rank where the ranks' matrix products would compete for the processors."""
    size, processors = workflow.settings.distributed.processes, os.cpu_count() or 1
    if backend == "nccl" or (workflow.settings.device != "cpu" and compute_device.may_have_gpu()):
        return
    threads = workflow.settings.threads or processors
    if threads > 1 and threads * size > processors:
        terminal.say(
            f"workflow.threads = {workflow.settings.threads}: {size} ranks with {threads} threads each share "
            f"{processors} processors. Set workflow.threads = {max(1, processors // size)} for speed."
        )
