"""Which files in an artifact's folder its own run wrote. The others are never removed unless a user asks for it.

Each run lists its files in its report, in the table that no digest reads. Another file in the folder is a person's, or
belongs to a variant of the same stage, whose folder lies in there when the stage had variants before.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlxflow.errors import ArtifactError
from mlxflow.storage import layout, report_files
from mlxflow.storage.digests import RUN_TABLE
from mlxflow.storage.model_files import decides

#: The key in a report's table of the run that lists the names of the files that the run wrote.
FILES_KEY = "files"


def written_names(folder: Path) -> list[str]:
    """Return the name of every file in a folder, relative to it, sorted; a link is a name like a file's."""
    return sorted(_names(folder))


def maker(folder: Path) -> str:
    """Return the stage that made a folder, as its report says, such as `train:a`; empty where none did."""
    stage = _report(folder).get("stage")
    return str(stage.get("stage", "")) if isinstance(stage, dict) else ""


def foreign_names(folder: Path, outputs: Iterable[str] = ()) -> list[str]:
    """Return the names of the files in an artifact's folder that are not the artifact's own, sorted.

    Of an artifact whose report does not list its files, which those of earlier versions do not, the files of artifacts
    in folders below it are foreign. Without a report every file is. A file that decides what a model does is the
    artifact's own wherever it came from: an artifact is what its stage makes.

    Args:
        folder: the artifact; it may be missing.
        outputs: names of files that are its own whatever the report says.
    """
    names = set(_names(folder)) - set(outputs)
    if not maker(folder):
        return sorted(names)
    names = {name for name in names if not decides(name)}
    run = _report(folder).get(RUN_TABLE)
    listed = run.get(FILES_KEY) if isinstance(run, dict) else None
    if isinstance(listed, list):
        return sorted(names - {str(name) for name in listed})
    return sorted(name for name in names if _lies_in_another(folder, name))


def remove_own_files(folder: Path, outputs: Iterable[str] = ()) -> list[str]:
    """Remove an artifact; return the names of the foreign files in its folder, which stay.

    Where the folder is a link the link stays, too, so that the next run writes to the same place.

    Args:
        folder: the artifact.
        outputs: see `foreign_names`.
    """
    kept = foreign_names(folder, outputs)
    for name in set(_names(folder)).difference(kept):
        (folder / name).unlink()
    for parent, _, _ in os.walk(os.path.realpath(folder), topdown=False):
        if not os.listdir(parent):  # noqa: PTH208
            os.rmdir(parent)  # noqa: PTH106
    return kept


def _lies_in_another(folder: Path, name: str) -> bool:
    parents = (folder / one for one in (Path(name), *Path(name).parents) if one != Path())
    return any(maker(one) for one in parents)


def _report(folder: Path) -> dict[str, object]:
    try:
        return report_files.read_report(folder / layout.REPORT)
    except (ArtifactError, OSError):
        return {}


def _names(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]  # noqa: PTH114, PTH118
        for name in (*files, *links):
            yield Path(parent, name).relative_to(folder).as_posix()
