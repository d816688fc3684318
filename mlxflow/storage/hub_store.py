"""A shared store in a data set on the Hugging Face hub, by `huggingface_hub` and its file system for fsspec.

Every upload of an artifact is one commit, which is whole or absent. Credentials are those of `hf auth login` or of the
variable HF_TOKEN.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlxflow.messages.errors import StoreError
from mlxflow.storage.object_store import Blob, ObjectStore, refusal

# Statuses of a commit on top of another one than the last
_CONFLICTS = (409, 412)
_MOST_ATTEMPTS = 8


class HubStore(ObjectStore):
    """A store in a data set.

    Args:
        repository: `owner/name`, with an optional `@revision`.
        path: the folder in it; empty for its root.
    """

    def __init__(self, repository: str, path: str) -> None:
        from huggingface_hub import HfApi, HfFileSystem
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        name, _, revision = repository.partition("@")
        self._repository: dict[str, Any] = {"repo_id": name, "repo_type": "dataset", "revision": revision or None}
        self._path = path
        self._root = "/".join(filter(None, ("datasets", *repository.split("/", 1), path)))
        self._api = HfApi()
        self._files: Any = HfFileSystem(skip_instance_cache=True, use_listings_cache=False)

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder; see `ObjectStore`."""
        with _reported():
            self._api.repo_info(**self._repository)  # a missing data set is an error
            try:
                entries = self._files.ls(f"{self._root}/{folder}", detail=True, refresh=True)
            except FileNotFoundError:
                return []
        return sorted(f"{folder}/{one['name'].rpartition('/')[2]}" for one in entries if one["type"] == "file")

    def read(self, name: str, largest: int) -> bytes | None:
        """Return the bytes of a file; see `ObjectStore`."""
        with _reported():
            try:
                if (size := self._size(name)) <= largest:
                    return bytes(self._files.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None
        raise refusal(f"{name} has {size:,} bytes, more than {largest:,}")

    def has(self, blob: Blob) -> bool:
        """Return whether there is a file; see `ObjectStore`."""
        with _reported():
            try:
                return self._size(blob.name) == blob.size
            except FileNotFoundError:
                return False

    def download(self, blob: Blob, path: Path) -> bool:
        """Write a file of the data set to a local one; see `ObjectStore`."""
        if not self.has(blob):
            return False
        with _reported():
            self._files.get_file(f"{self._root}/{blob.name}", str(path))
        return True

    def publish(
        self, blobs: Mapping[Blob, Path], name: str, document: bytes, check: Callable[[], None], *, replace: bool
    ) -> bool:
        """Commit the files that are missing and the document together; see `ObjectStore`."""
        for _ in range(_MOST_ATTEMPTS):
            if not replace and name in self.names(name.rpartition("/")[0]):
                return False
            if self._commit(blobs, name, document, check, replace=replace):
                return True
        raise refusal("other uploads were always faster. Try again")

    def _commit(
        self, blobs: Mapping[Blob, Path], name: str, document: bytes, check: Callable[[], None], *, replace: bool
    ) -> bool:
        """Make a commit; return False if there is another one since the store was last asked."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError

        with _reported():
            head = self._api.repo_info(**self._repository).sha
            files = {blob.name: path for blob, path in blobs.items() if replace or not self.has(blob)}
            added = [CommitOperationAdd(self._inside(one), str(path)) for one, path in files.items()]
            self._api.preupload_lfs_files(additions=added, free_memory=False, **self._repository)
            check()
            added.append(CommitOperationAdd(self._inside(name), document))
            message = f"Add {name.rpartition('/')[2]}"
            try:
                self._api.create_commit(
                    operations=added, commit_message=message, parent_commit=head, **self._repository
                )
            except HfHubHTTPError as error:
                if _status(error) in _CONFLICTS:
                    return False
                raise
        return True

    def check_writable(self) -> None:
        """Ask whether the credentials may write; see `ObjectStore`."""
        with _reported():
            arguments = {key: value for key, value in self._repository.items() if key != "revision"}
            self._api.auth_check(write=True, **arguments)

    def _inside(self, name: str) -> str:
        return f"{self._path}/{name}" if self._path else name

    def _size(self, name: str) -> int:
        return int(self._files.info(f"{self._root}/{name}", refresh=True)["size"])


@contextmanager
def _reported() -> Iterator[None]:
    """Convert every error of the hub's client to a `StoreError`, without its advice and request ids."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        yield
    except StoreError:
        raise
    except RepositoryNotFoundError as error:
        raise refusal("no such data set, or the credentials do not allow to see it") from error
    except HfHubHTTPError as error:
        raise refusal(f"the hub answered {_status(error)}") from error
    except Exception as error:  # those of the network
        raise refusal(f"cannot be reached ({str(error)[:200]})") from error


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))
