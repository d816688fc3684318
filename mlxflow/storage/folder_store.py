"""A shared store in a folder, such as one on a network drive: an object is a file that is moved into place.

Own code, because neither fsspec nor obstore is needed for it: fsspec writes into the file that readers open, and
obstore read a file at a third of its speed (docs/guides/store.md).
"""

import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxflow.messages.os_errors import ABSENT, advise
from mlxflow.storage import flushing
from mlxflow.storage.object_store import Blob, PlainStore, refusal

_INCOMING = "incoming"

# Unfinished files of writers that were killed, on any machine
_ABANDONED_SECONDS = 7 * 24 * 3600


class FolderStore(PlainStore):
    """A store in a folder.

    Args:
        folder: it must exist: a drive that is not mounted is no empty store.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder; see `ObjectStore`."""
        with self._reported():
            try:
                with os.scandir(self._folder / folder) as entries:
                    return sorted(f"{folder}/{entry.name}" for entry in entries if entry.is_file())
            except ABSENT:
                return []

    def read(self, name: str, largest: int) -> bytes | None:
        """Return the bytes of a file; see `ObjectStore`."""
        with self._reported():
            try:
                with self._opened(name) as descriptor, open(descriptor, "rb", closefd=False) as file:
                    data = file.read(largest + 1)
            except ABSENT:
                return None
        if len(data) > largest:
            raise refusal(f"{name} has more than {largest:,} bytes")
        return data

    def download(self, blob: Blob, path: Path) -> bool:
        """Copy a file; see `ObjectStore`."""
        with self._reported():
            try:
                with self._opened(blob.name) as descriptor:
                    if os.fstat(descriptor).st_size != blob.size:
                        return False
                    with open(descriptor, "rb", closefd=False) as file, path.open("wb") as target:
                        shutil.copyfileobj(file, target, 1 << 22)
            except ABSENT:
                return False
        return True

    def has(self, blob: Blob) -> bool:
        """Return whether there is a file; see `ObjectStore`."""
        with self._reported():
            try:
                return (self._folder / blob.name).stat().st_size == blob.size
            except ABSENT:
                return False

    def upload(self, path: Path, blob: Blob) -> None:
        """Copy a file; see `PlainStore`."""
        with self._incoming() as temporary, self._reported():
            with path.open("rb") as source, temporary.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 22)
                file.flush()
                flushing.flush_drive(file.fileno())
            self._place(blob.name).parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(self._place(blob.name))

    def write(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Write a file; see `PlainStore`."""
        with self._incoming() as temporary, self._reported():
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                flushing.flush_drive(file.fileno())
            place = self._place(name)
            place.parent.mkdir(parents=True, exist_ok=True)
            if replace:
                temporary.replace(place)
                return True
            try:
                place.hardlink_to(temporary)  # unlike a rename, it fails if there is one
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                if place.exists():
                    return False
                temporary.replace(place)
            return True

    def _place(self, name: str) -> Path:
        return self._folder / name

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """Open a regular file; a pipe, a device or a folder is refused without blocking."""
        descriptor = os.open(self._folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise refusal(f"{name} is no regular file")
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        """Yield the path for a file that is being written; it is removed if it is still there afterwards."""
        with self._reported():
            folder = self._folder / _INCOMING
            folder.mkdir(exist_ok=True)
            for one in folder.iterdir():
                with suppress(FileNotFoundError):
                    if one.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                        one.unlink()
        temporary = folder / f"{secrets.token_hex(12)}.tmp"
        try:
            yield temporary
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Convert errors of file calls to a `StoreError`; a missing folder is one."""
        if not self._folder.is_dir():
            raise refusal("no such folder. Make it, or mount its drive")
        try:
            yield
        except OSError as error:
            raise refusal(f"{error.strerror or error}. {advise(error)}") from error
