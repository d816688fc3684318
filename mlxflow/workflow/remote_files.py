"""What ranks on other hosts are started with, and the files of a project that they get a copy of."""

import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlxflow.distributed.remote_rank import Remotes, SharedFile
from mlxflow.messages.errors import WorkflowError
from mlxflow.storage import layout, paths, unfinished_runs
from mlxflow.storage.digests import DigestCache, digest_text
from mlxflow.workflow.model import Stage, Workflow
from mlxflow.workflow.remote_agent import versions


def remotes_of(workflow: Workflow, stage: Stage, arguments: Sequence[str]) -> Remotes:
    """Return what the ranks of a stage on other hosts are started with.

    Args:
        workflow: the workflow.
        stage: one of its stages, which trains.
        arguments: of Python, for a rank.

    Raises:
        WorkflowError: an input is outside of the workflow's folder, and its name is not absolute.
    """
    read = stage.files_read(workflow.root).values()
    outside = [paths.shown(name) for name in read if not name.is_absolute() and ".." in name.parts]
    if outside:
        raise WorkflowError(
            *(
                f"{name}: is outside of the workflow's folder, and ranks on other hosts get copies of files inside. "
                "Move it there, or write an absolute path that every host has."
                for name in outside
            )
        )
    place = f"{socket.gethostname()}:{workflow.root.resolve()}:{stage.task}"
    return Remotes(
        python=workflow.settings.distributed.python or sys.executable,
        agent="mlxflow.workflow.remote_agent",
        arguments=("-P", *arguments),
        project=digest_text(place)[:16],
        versions=versions(),
        list_files=lambda: list(_shared_files(workflow, stage)),
    )


def _shared_files(workflow: Workflow, stage: Stage) -> Iterator[SharedFile]:
    """Yield the inputs below the workflow's folder, and the newest checkpoint."""
    cache = DigestCache(workflow.state / layout.DIGESTS)
    names = [name for name in stage.files_read(workflow.root).values() if not name.is_absolute()]
    for name in dict.fromkeys([*names, *_checkpoint_files(workflow, stage)]):
        path = workflow.root / name
        yield SharedFile(name.as_posix(), path, path.stat().st_size, cache.digests(path).content)
    cache.save()


def _checkpoint_files(workflow: Workflow, stage: Stage) -> Iterator[Path]:
    """Yield the files of the newest checkpoint of each interrupted run, relative to the workflow's folder."""
    for run in unfinished_runs.of_task(workflow.state, stage.task):
        newest = sorted(folder for folder in run.folder.glob("step-*") if folder.is_dir())[-1:]
        for path in (*(path for folder in newest for path in folder.iterdir()), *run.folder.glob("best-*.safetensors")):
            yield path.relative_to(workflow.root)
