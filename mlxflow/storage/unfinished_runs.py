"""Checkpoints of interrupted runs, from which a later run resumes: one folder for each configuration of a stage.

    artifacts/.mlxflow/unfinished/train/0123456789ab/         of stage `train`
    artifacts/.mlxflow/unfinished/quantize/q4/0123456789ab/   of variant `quantize:q4`

A folder is removed when its run succeeds. When a stage succeeds, its folders of other settings are removed, except
that the newest one is kept for a week in case the settings are restored.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mlxflow.storage import layout
from mlxflow.storage.atomic_folders import remove_folder
from mlxflow.storage.digests import digest_json

KEPT_SECONDS = 7 * 24 * 3600

_KEY = re.compile(r"[0-9a-f]{12}")


class Unfinished(NamedTuple):
    """An unfinished run: its folder, its size in bytes, and the time of the last write, in seconds since 1970."""

    folder: Path
    num_bytes: int
    written: float

    def remove(self) -> None:
        """Remove it."""
        remove_folder(self.folder)


def key_of(settings_digest: str, inputs_digest: str, threads: int | None) -> str:
    """Return a short key of the settings, the inputs and the number of threads of a run; None on a GPU."""
    known = {"settings_digest": settings_digest, "inputs_digest": inputs_digest}
    return digest_json(known | ({"threads": threads} if threads else {}))[:12]


def stage_folder(state: Path, task: str) -> Path:
    """Return the folder of all interrupted runs of `stage` or `stage:variant`, inside the state folder."""
    return state / layout.UNFINISHED / task.replace(":", "/")


def folder_of(state: Path, task: str, key: str) -> Path:
    """Return the folder of a run.

    Args:
        state: the state folder.
        task: the stage.
        key: 12 hexadecimal digits for its settings and inputs.
    """
    return stage_folder(state, task) / key


def of_task(state: Path, task: str) -> list[Unfinished]:
    """Return the unfinished runs of a stage, newest first."""
    return _in(stage_folder(state, task))


def of_no_task(state: Path, tasks: Iterable[str]) -> list[Unfinished]:
    """Return the unfinished runs of stages and variants that are not among the given ones."""
    top = state / layout.UNFINISHED
    known = {stage_folder(state, task) for task in tasks}
    parents = [*_folders(top), *(variant for stage in _folders(top) for variant in _folders(stage))]
    return [run for parent in parents if parent not in known for run in _in(parent)]


def prune(state: Path, task: str) -> Iterator[Unfinished]:
    """Remove and yield the unfinished runs of a stage with other settings, except the newest one while it is recent."""
    for number, run in enumerate(of_task(state, task)):
        if number or run.written < time.time() - KEPT_SECONDS:
            run.remove()
            yield run


def size_of(folder: Path) -> int:
    """Return the total size of the files in a folder or in a link's target; links inside are not followed."""
    return sum(stat.st_size for stat in _stats(folder))


def _in(parent: Path) -> list[Unfinished]:
    folders = [folder for folder in _folders(parent) if _KEY.fullmatch(folder.name)]
    written = {folder: max((s.st_mtime for s in _stats(folder)), default=folder.stat().st_mtime) for folder in folders}
    runs = [Unfinished(folder, size_of(folder), written[folder]) for folder in folders]
    return sorted(runs, key=lambda one: one.written, reverse=True)


def _stats(folder: Path) -> list[os.stat_result]:
    return [Path(parent, name).lstat() for parent, _, names in os.walk(os.path.realpath(folder)) for name in names]


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir() or parent.is_symlink():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
