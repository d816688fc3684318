"""The inputs of a run: their content as the run saw it first, and whether they are still that when it ends."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mlxflow.errors import StageError
from mlxflow.storage.digests import DigestCache, Digests
from mlxflow.storage.paths import printable


class _ObservedFile(NamedTuple):
    """A file as it was seen first.

    Attributes:
        written: size, time of modification and inode.
        changed_ns: time of the last change of anything about it, its name or its rights for instance.
        digests: of its content.
    """

    written: tuple[int, int, int]
    changed_ns: int
    digests: Digests


class ObservedInputs(DigestCache):
    """A cache whose first answer about a file holds for the whole run, whatever becomes of the file.

    So a record names one content for each input. A reader that compares what it reads with that content may call
    `settle`. Of every other file `changed` says whether it was written or replaced since it was seen first. A file
    that was written and then put back counts as changed: the run may have read it in between. A file whose
    mode or attributes alone were changed does not.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._seen: dict[str, _ObservedFile] = {}
        self._settled: set[str] = set()

    def digests(
        self, path: str | os.PathLike[str], *, again: bool = False, found: os.stat_result | None = None
    ) -> Digests:
        """Return what was said of a file first; `again` asks the disk. The file is looked at here, whatever was found.

        Raises:
            OSError: the file cannot be read.
            ValueError: a safetensors file whose header disagrees with its length.
        """
        key = os.path.abspath(path)  # noqa: PTH100 - links stay as they are named
        if again:
            return super().digests(key, again=True)
        if key not in self._seen:
            before = os.stat(key)  # noqa: PTH116
            self._seen[key] = _ObservedFile(_written(before), before.st_ctime_ns, super().digests(key))
        return self._seen[key].digests

    def settle(self, paths: Iterable[Path]) -> None:
        """Note files whose read bytes have all been compared with their digests."""
        self._settled.update(os.path.abspath(path) for path in paths)  # noqa: PTH100

    def join(self, other: "ObservedInputs") -> None:
        """Take over what a copy of this object noted in another process."""
        self._seen |= other._seen
        self._settled |= other._settled

    def is_unchanged(self, path: str | os.PathLike[str]) -> bool:
        """Return whether a file is as it was seen first; one that was not seen is not."""
        key = os.path.abspath(path)  # noqa: PTH100
        seen = self._seen.get(key)
        try:
            now = os.stat(key)  # noqa: PTH116
            if seen is None or _written(now) != seen.written:
                return False
            return now.st_ctime_ns == seen.changed_ns or super().digests(key) == seen.digests
        except (OSError, ValueError):
            return False

    def changed(self) -> list[Path]:
        """Return the files that were read and are not as they were seen first, sorted; settled ones are left out."""
        return [Path(key) for key in sorted(self._seen) if key not in self._settled and not self.is_unchanged(key)]

    def require_unchanged(self, task: str, root: Path) -> None:
        """Refuse to go on where an input was changed.

        Args:
            task: the stage.
            root: the workflow's folder.

        Raises:
            StageError: one or more were; one line for each.
        """
        lines = [
            f"{_shown(path, root)}: changed while {task} ran, so its result is not kept. Run it again."
            for path in self.changed()
        ]
        if lines:
            raise StageError("\n".join(lines))


def _written(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _shown(path: Path, root: Path) -> str:
    top = Path(os.path.abspath(root))  # noqa: PTH100
    return printable(path.relative_to(top).as_posix() if path.is_relative_to(top) else str(path))
