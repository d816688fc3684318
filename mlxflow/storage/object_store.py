"""A shared store of artifacts: small documents by key, and the files that they describe by content.

A document is written last, after every file that it names, so that a reader finds an artifact whole or not at all.
Files are named by their content: two writers of one file write the same bytes. A document is created once; the second
of two writers keeps the first one's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from mlxflow.messages.errors import StoreError
from mlxflow.storage.store_url import StoreUrl, parse, scrubbed


class Blob(NamedTuple):
    """A file in a store: its name there, made of its content's digest, and its size in bytes."""

    name: str
    size: int


class ObjectStore(ABC):
    """Where objects are stored by names such as `keys/a/b.json`.

    Every method raises a `StoreError` if the store is missing, refuses or cannot be reached; its message is the reason
    without an address, and holds no credentials.
    """

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Return the names of the objects in a folder of the store, sorted; empty if there is no such folder."""

    @abstractmethod
    def read(self, name: str, largest: int) -> bytes | None:
        """Return the bytes of an object; None if there is none.

        Args:
            name: of the object.
            largest: the most bytes.
        """

    @abstractmethod
    def has(self, blob: Blob) -> bool:
        """Return whether there is an object of a name and a size."""

    @abstractmethod
    def download(self, blob: Blob, path: Path) -> bool:
        """Write an object to a file; return False if the store has none of its name and size."""

    @abstractmethod
    def publish(
        self, blobs: Mapping[Blob, Path], name: str, document: bytes, check: Callable[[], None], *, replace: bool
    ) -> bool:
        """Upload files and, when all of them are there, the document that describes them.

        Args:
            blobs: the files; those that the store has are not uploaded again, unless `replace`.
            name: of the document.
            document: its bytes.
            check: called before the document is written; raises if a file changed meanwhile.
            replace: write everything even if it is there.

        Returns:
            whether the document was written; False if there is one.
        """

    @abstractmethod
    def check_writable(self) -> None:
        """Write something small, so that a refusal is known before hours are spent."""


class PlainStore(ObjectStore):
    """A store with objects that are written one by one, each whole or not at all."""

    @abstractmethod
    def upload(self, path: Path, blob: Blob) -> None:
        """Write a file as an object; an existing one is replaced."""

    @abstractmethod
    def write(self, name: str, data: bytes, *, replace: bool) -> bool:
        """Write an object; return False if there is one and it is not to be replaced."""

    def publish(
        self, blobs: Mapping[Blob, Path], name: str, document: bytes, check: Callable[[], None], *, replace: bool
    ) -> bool:
        """Upload the files that are missing, then the document; see `ObjectStore.publish`."""
        for blob, path in blobs.items():
            if replace or not self.has(blob):
                self.upload(path, blob)
        check()
        return self.write(name, document, replace=replace)

    def check_writable(self) -> None:
        """Write an object of a few bytes."""
        self.write("writable", b"mlxflow\n", replace=True)


def open_store(url: str) -> ObjectStore:
    """Return the store of an address; nothing is read or written yet.

    Args:
        url: an address that `mlxflow.storage.store_url` accepts.

    Raises:
        StoreError: a package is missing, or a profile names no credentials.
    """
    parts = parse(url)
    if parts.scheme == "file":
        from mlxflow.storage.folder_store import FolderStore

        return FolderStore(Path(parts.path))
    if parts.scheme == "hf":
        from mlxflow.storage.hub_store import HubStore

        return HubStore(parts.place, parts.path)
    return _bucket(parts)


def _bucket(parts: StoreUrl) -> ObjectStore:
    try:
        import obstore  # noqa: F401 - it is imported again where it is used
    except ImportError as error:
        raise StoreError("needs obstore. Run: pip install 'mlxflow[store]'") from error
    from mlxflow.storage.bucket_store import BucketStore

    return BucketStore(parts)


def refusal(reason: str) -> StoreError:
    """Return the error of a store for a reason, on one line and without credentials."""
    return StoreError(" ".join(scrubbed(reason).split()))
