"""Find the files in an artifact's folder that its run wrote. Other ("foreign") files are removed only on request.

Each run lists its files in its report, in the table `run`, which is not part of digests. Other files in the folder
are the user's, or belong to a former variant of the stage, whose folder is inside.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from mlxflow.messages.errors import ArtifactError
from mlxflow.storage import layout, report_structs
from mlxflow.storage.model_files import decides


class _Maker(msgspec.Struct, frozen=True):
    """Of a report's table `stage` the name of the stage."""

    stage: str = ""


class _WrittenFiles(msgspec.Struct, frozen=True):
    """Of a report's table `run` the names of the files that the run wrote; None in reports of earlier versions."""

    files: tuple[str, ...] | None = None


class _Ownership(msgspec.Struct, frozen=True):
    """The keys of a report that say what its stage wrote."""

    stage: _Maker = _Maker()
    run: _WrittenFiles = _WrittenFiles()


def written_names(folder: Path) -> list[str]:
    """Return the name of every file and link in a folder, relative to it, sorted."""
    return sorted(_names(folder))


def maker(folder: Path) -> str:
    """Return the stage that made a folder according to its report, such as `train:a`; empty without a report."""
    return _read(folder).stage.stage


def foreign_names(folder: Path, outputs: Iterable[str] = ()) -> list[str]:
    """Return the names of the foreign files in an artifact's folder, sorted.

    If the report does not list files, as in earlier versions, only files of artifacts in folders below it are
    foreign. Without a report every file is foreign. A file that defines the model always belongs to the artifact,
    regardless of its origin.

    Args:
        folder: the artifact; it may be missing.
        outputs: names of files that belong to it regardless of the report.
    """
    names = set(_names(folder)) - set(outputs)
    report = _read(folder)
    if not report.stage.stage:
        return sorted(names)
    names = {name for name in names if not decides(name)}
    if report.run.files is not None:
        return sorted(names.difference(report.run.files))
    return sorted(name for name in names if _lies_in_another(folder, name))


def remove_own_files(folder: Path, outputs: Iterable[str] = ()) -> list[str]:
    """Remove an artifact; return the names of the foreign files in its folder, which are kept.

    If the folder is a link, the link is kept, so that the next run writes to the same place.

    Args:
        folder: the artifact.
        outputs: see `foreign_names`.
    """
    foreign = foreign_names(folder, outputs)
    for name in set(_names(folder)).difference(foreign):
        (folder / name).unlink()
    for parent, _, _ in os.walk(os.path.realpath(folder), topdown=False):
        if not os.listdir(parent):  # noqa: PTH208
            os.rmdir(parent)  # noqa: PTH106
    return foreign


def _lies_in_another(folder: Path, name: str) -> bool:
    parents = (folder / one for one in (Path(name), *Path(name).parents) if one != Path())
    return any(maker(parent) for parent in parents)


def _read(folder: Path) -> _Ownership:
    """Return the facts of the report; empty if it cannot be read, so that no file is the artifact's own."""
    try:
        return report_structs.read_part(folder / layout.REPORT, _Ownership, advice="")
    except (ArtifactError, OSError):
        return _Ownership()


def _names(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]  # noqa: PTH114, PTH118
        for name in (*files, *links):
            yield Path(parent, name).relative_to(folder).as_posix()
