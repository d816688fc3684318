"""Artifacts of stages and variants that the workflow no longer has; they are removed only on request."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mlxflow.storage import layout, ownership
from mlxflow.workflow.stage_node import Node


class Leftover(NamedTuple):
    """An artifact without a stage: its folder, relative to the workflow's, number of files and bytes."""

    folder: Path
    num_files: int
    num_bytes: int

    def __str__(self) -> str:
        size = f"{self.num_files} files, {self.num_bytes:,} bytes"
        return f"{self.folder.as_posix()}: belongs to no stage ({size}). {advise_removal()}"


def advise_removal() -> str:
    """Return the advice to remove what belongs to no stage; `doit` works only where there is a dodo.py."""
    return "Remove it with: doit clean --leftovers" if Path("dodo.py").is_file() else "Remove the folder."


def find_leftovers(root: Path, nodes: Iterable[Node]) -> Iterator[Leftover]:
    """Yield the artifacts of stages and variants that no longer exist.

    A folder counts if its report names the stage that the folder is named after; renamed copies do not.

    Args:
        root: the workflow's folder.
        nodes: every stage of the workflow.
    """
    known = {Path(node.folder) for node in nodes}
    for report in layout.report_files(root):
        folder = report.parent.relative_to(root)
        if folder in known or layout.stage_folder(ownership.maker(root / folder)) != folder:
            continue
        names = set(ownership.written_names(root / folder)).difference(ownership.foreign_names(root / folder))
        sizes = [(root / folder / name).lstat().st_size for name in names]
        yield Leftover(folder, len(sizes), sum(sizes))


def remove_leftover(root: Path, leftover: Leftover) -> None:
    """Remove a leftover; files in its folder that its run did not write are kept."""
    ownership.remove_own_files(root / leftover.folder)
