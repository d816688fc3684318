"""What runs that were cut off left for the next one to go on from: checkpoints, a folder for each way a stage was set.

    artifacts/.mlxflow/unfinished/train/0123456789ab/         of stage `train`
    artifacts/.mlxflow/unfinished/quantize/q4/0123456789ab/   of variant `quantize:q4`

One is removed when its run ends well. Of other settings the newest one stays for a week after it was written, in
case the settings are put back; it is removed, as all older ones are, when the stage ends well with its settings of
then.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mlxflow.storage import layout
from mlxflow.storage.atomic_folders import remove_folder

KEPT_SECONDS = 7 * 24 * 3600

_KEY = re.compile(r"[0-9a-f]{12}")


class Unfinished(NamedTuple):
    """What one run left: its folder, the bytes in it, and when it was last written, in seconds since 1970."""

    folder: Path
    num_bytes: int
    written: float

    def remove(self) -> None:
        """Remove it."""
        remove_folder(self.folder)


def stage_folder(state: Path, task: str) -> Path:
    """Return the folder of all interrupted runs of `stage` or `stage:variant`, below the folder of the state."""
    return state / layout.UNFINISHED / task.replace(":", "/")


def folder_of(state: Path, task: str, key: str) -> Path:
    """Return the folder of a run.

    Args:
        state: where state lies in the artifacts.
        task: the stage.
        key: 12 hexadecimal digits for its settings and inputs.
    """
    return stage_folder(state, task) / key


def of_task(state: Path, task: str) -> list[Unfinished]:
    """Return what runs of a stage left, the newest first."""
    return _in(stage_folder(state, task))


def of_no_task(state: Path, tasks: Iterable[str]) -> list[Unfinished]:
    """Return what runs left of stages and variants that are not among the given ones."""
    top = state / layout.UNFINISHED
    known = {stage_folder(state, task) for task in tasks}
    parents = [*_folders(top), *(variant for stage in _folders(top) for variant in _folders(stage))]
    return [found for parent in parents if parent not in known for found in _in(parent)]


def prune(state: Path, task: str) -> Iterator[Unfinished]:
    """Remove and yield what runs of a stage with other settings left, but for the newest one while it is recent."""
    for number, found in enumerate(of_task(state, task)):
        if number or found.written < time.time() - KEPT_SECONDS:
            found.remove()
            yield found


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder, which may be a link to it; of links in it their own."""
    return sum(stat.st_size for stat in _stats(folder))


def _in(parent: Path) -> list[Unfinished]:
    folders = [folder for folder in _folders(parent) if _KEY.fullmatch(folder.name)]
    written = {folder: max((s.st_mtime for s in _stats(folder)), default=folder.stat().st_mtime) for folder in folders}
    found = [Unfinished(folder, size_of(folder), written[folder]) for folder in folders]
    return sorted(found, key=lambda one: one.written, reverse=True)


def _stats(folder: Path) -> list[os.stat_result]:
    return [Path(parent, name).lstat() for parent, _, names in os.walk(os.path.realpath(folder)) for name in names]


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir() or parent.is_symlink():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
