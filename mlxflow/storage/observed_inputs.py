"""The inputs of a run: their content when first read, and whether they are unchanged at the end."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mlxflow.messages.errors import StageError
from mlxflow.storage.digests import DigestCache, Digests
from mlxflow.storage.paths import printable


class _ObservedFile(NamedTuple):
    """A file when it was first read.

    Attributes:
        written: size, modification time and inode.
        changed_ns: time of the last change of the file or its attributes, such as name or permissions.
        digests: of its content.
    """

    written: tuple[int, int, int]
    changed_ns: int
    digests: Digests


class ObservedInputs(DigestCache):
    """A digest cache that returns the first digests of a file for the whole run, even if the file changes.

    So a record has one content for each input. A reader that compares the bytes it reads with that content may call
    `settle`. For all other files, `changed` returns whether they were written or replaced since then. A file that was
    written and then restored counts as changed, because the run may have read it in between. A change of mode or
    attributes alone does not count.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._seen: dict[str, _ObservedFile] = {}
        self._settled: set[str] = set()

    def digests(
        self, path: str | os.PathLike[str], *, again: bool = False, status: os.stat_result | None = None
    ) -> Digests:
        """Return the first digests of a file; `again` reads it from the disk. `status` is not used.

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
        """Record files whose bytes were all compared with their digests while reading."""
        self._settled.update(os.path.abspath(path) for path in paths)  # noqa: PTH100

    def join(self, other: "ObservedInputs") -> None:
        """Merge the records of a copy of this object from another process."""
        self._seen |= other._seen
        self._settled |= other._settled

    def is_unchanged(self, path: str | os.PathLike[str]) -> bool:
        """Return whether a file is unchanged since it was first read; False for a file that was not read."""
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
        """Return the files that were read and have changed since, sorted; settled ones are left out."""
        return [Path(key) for key in sorted(self._seen) if key not in self._settled and not self.is_unchanged(key)]

    def require_unchanged(self, task: str, root: Path) -> None:
        """Raise an error if an input was changed.

        Args:
            task: the stage.
            root: the workflow's folder.

        Raises:
            StageError: inputs changed; one line for each.
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
