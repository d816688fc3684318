"""Stamps of the files from which a run's page is drawn: a change of one is noticed without reading any."""

import os
from collections.abc import Iterator
from pathlib import Path

from mlxflow.storage import layout

#: Of a file: name, size in bytes, time of its last change.
FileStamp = tuple[str, int, int]


def stamps(root: Path) -> tuple[FileStamp, ...]:
    """Return a stamp of every file of the run in a workflow's folder, sorted.

    Args:
        root: the workflow's folder; its artifacts may not exist yet.
    """
    return tuple(sorted(stamp for path in _files(root) if (stamp := _stamp(path))))


def _files(root: Path) -> Iterator[Path]:
    """Yield the workflow file, the lock, every file of an artifact, and the journals of the state."""
    state = layout.state_folder(root)
    yield from (root / layout.WORKFLOW, root / layout.LOCKFILE, state / layout.JOURNAL)
    yield from (state / layout.UNFINISHED).glob(f"**/{layout.TIMELINE_JOURNAL}")
    for parent, folders, names in os.walk(layout.artifacts_folder(root)):
        folders[:] = [name for name in folders if name != layout.STATE]
        links = [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
        yield from (link / name for link in links for name in (layout.REPORT, layout.METRICS))
        yield Path(parent)  # a folder that is made or removed counts, too
        yield from (Path(parent, name) for name in names if name not in (layout.PAGE, layout.COMPARISON_PAGE))


def _stamp(path: Path) -> FileStamp | None:
    try:
        found = path.stat()
    except OSError:  # removed meanwhile
        return None
    return str(path), found.st_size, found.st_mtime_ns
