"""Run a stage on several processes: this one supervises the ranks, and rank 0 writes the artifact."""

import os
import sys
from pathlib import Path

from mlxflow.device import compute_device
from mlxflow.distributed.backends import require_available, require_gpus
from mlxflow.distributed.mpi_meeting import require_mpirun
from mlxflow.distributed.rank import Rank
from mlxflow.messages import terminal
from mlxflow.storage import atomic_folders, layout
from mlxflow.storage.regular_files import open_log
from mlxflow.workflow.handover import Basis, Handover
from mlxflow.workflow.model import Stage, Workflow
from mlxflow.workflow.remote_files import remotes_of


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
    from mlxflow.distributed.launcher import Launch
    from mlxflow.distributed.supervisor import RestartLimits, supervise

    table, ranks = workflow.settings.distributed, workflow.ranks
    require_gpus(table, ranks.backend, ranks.hosts)
    if ranks.backend == "mpi":
        require_mpirun()
    _advise_on_threads(workflow)
    apart = Path(layout.STATE, layout.RANKS) if into else None  # no checkpoint of the workflow's own run
    launch = Launch(
        command=(sys.executable, "-P", *_arguments(stage, str(workflow.path), into)),
        data=(handover or _handover(workflow, stage)).as_bytes(),
        size=ranks.number,
        backend=ranks.backend,
        reduction=table.reduction,
        shards_optimizer=table.optimizer_sharding,
        shards_layers=table.sharding == "full",
        logs=tuple(layout.log_file(workflow.root, f"{stage.task}:rank:{number}") for number in range(ranks.number)),
        open_log=open_log,
        threads=workflow.settings.threads,
        hosts=ranks.hosts,
        remotes=remotes_of(workflow, stage, _arguments(stage, workflow.path.name, apart)) if ranks.hosts else None,
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
        require_available(rank.backend)
        from mlxflow.distributed import team

        team.of_this_process()


def folder_of_rank(workflow: Workflow, stage: Stage, rank: Rank) -> Path:
    """Return the folder of a rank other than 0, which writes nothing that is kept."""
    return _ranks_folder(workflow, stage) / str(rank.number)


def _ranks_folder(workflow: Workflow, stage: Stage) -> Path:
    return workflow.state / layout.RANKS / stage.task.replace(":", "/")


def _arguments(stage: Stage, file: str, into: Path | None) -> tuple[str, ...]:
    """Return the arguments of Python for a rank.

    Args:
        stage: that it runs.
        file: the workflow file.
        into: see `run_ranks`.
    """
    return ("-m", "mlxflow", "run", stage.task, f"--workflow={file}", *([f"--into={into}"] if into else []))


def _handover(workflow: Workflow, stage: Stage) -> Handover:
    """Return the data by which every rank resolves the workflow that this process has read."""
    settings = stage.settings() | compute_device.environment(stage.bound_device)
    return Handover(Basis(workflow.text, workflow.disk.lookups), settings, None)


def _advise_on_threads(workflow: Workflow) -> None:
    """Advise fewer threads for each rank where the ranks' matrix products would compete for the processors."""
    size, processors = workflow.ranks.number_here, os.cpu_count() or 1
    if workflow.ranks.backend == "nccl" or (workflow.settings.device != "cpu" and compute_device.may_have_gpu()):
        return
    threads = workflow.settings.threads or processors
    if threads > 1 and threads * size > processors:
        terminal.say(
            f"workflow.threads = {workflow.settings.threads}: {size} ranks with {threads} threads each share "
            f"{processors} processors. Set workflow.threads = {max(1, processors // size)} for speed."
        )
