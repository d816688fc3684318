"""Artifacts in the shared store of a workflow: take one instead of building it, and upload those that were built.

    v1/keys/KEY/INPUTS.record     the record of an artifact, after a line with a checksum: KEY is what `doit cache-key`
                                  prints, INPUTS a digest of what the stage read
    v1/blobs/ab/DIGEST-SIZE       a file, by the digest in the record

The key is known before anything is built. Two machines may have built a stage of one key with other last bits; what
read from them has other INPUTS, so that an artifact is taken only if it was made from the files that are here.

A build does not depend on the store: whatever fails there is one line, and the stage is built. Imported by every
`doit`, so it imports nothing heavy, and nothing is asked of the store before a stage is stale.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxflow.messages import terminal
from mlxflow.messages.errors import MlxflowError, StageError, StoreError
from mlxflow.storage.digests import DigestCache, digest_json
from mlxflow.tasks import stored_artifact
from mlxflow.tasks.stored_artifact import StoredArtifact, UnusableArtifactError, blob_of
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import StaleStage, observe_inputs, observe_settings

if TYPE_CHECKING:
    from mlxflow.storage.object_store import ObjectStore
    from mlxflow.workflow.store_table import StoreTable

_KEYS = "v1/keys"

#: What is said of a stage that is, or will be, taken.
FROM_THE_STORE = "from the store"

_BUILT_HERE = "Stages are built here instead."


class Pushed(NamedTuple):
    """What an upload did.

    Attributes:
        is_new: the record was written.
        differs: the store keeps another result of the same settings and inputs.
    """

    is_new: bool
    differs: bool = False


class StageStore:
    """The shared store of a workflow, for one process of doit.

    Args:
        nodes: every stage.
        cache: digests by path.

    Attributes:
        takes: whether artifacts are taken instead of built, if the workflow allows it.
    """

    def __init__(self, nodes: Sequence[Node], cache: DigestCache) -> None:
        self._nodes = nodes
        self._cache = cache
        self.takes = True
        self._uploads: bool | None = None  # None until it was tried
        self._damaged: set[str] = set()
        self._built: list[tuple[Node, dict[str, Any]]] = []
        self._turn = threading.Lock()

    @cached_property
    def table(self) -> "StoreTable | None":
        """The `[store]` table; None if the workflow has none."""
        from mlxflow.workflow.store_table import of_text

        basis = self._nodes[0].basis
        return of_text(basis.text) if basis else None

    @cached_property
    def _objects(self) -> "ObjectStore":
        from mlxflow.storage.object_store import open_store

        return open_store(self._url)

    @property
    def _url(self) -> str:
        return self.table.url if self.table else ""

    def take(self, node: Node) -> dict[str, Any] | None:
        """Install the artifact of a stale stage if the store has it, and return its record; else None.

        Whatever fails is printed in one line. The first failure to reach the store ends taking for this process.
        """
        if self.table is None:
            return None
        with self._turn:
            self._try_writing()
        if not (self.takes and self.table.pull and _is_shared(node)):
            return None
        try:
            return self.fetch(node)
        except UnusableArtifactError as error:
            self._damaged.add(node.task)
            terminal.say(f"{error}. {node.task} is built instead.")
        except StoreError as error:
            self.takes = False
            terminal.say(f"{str(error).rstrip('.')}. {_BUILT_HERE}")
        except StageError as error:
            terminal.say(f"{str(error).rstrip('.')}. {node.task} is built instead.")
        return None

    def fetch(self, node: Node) -> dict[str, Any] | None:
        """Install the artifact of a stage, and return its record; None if the store does not have it.

        Raises:
            StoreError: the store fails, or what it has is damaged; the artifact here is unchanged.
            StageError: the disk is full.
        """
        try:
            inputs = observe_inputs(node, self._cache)
        except (OSError, ValueError):  # an input is missing or damaged: the build says so
            return None
        with self._naming():
            name = self._name(node, inputs)
            if name not in self._objects.names(name.rpartition("/")[0]):
                return None
            stored = self._read(node, name)
            values = stored.values
            if values["settings"] != observe_settings(node) or values["inputs"] != inputs:
                raise UnusableArtifactError(f"{name}: is a record of other settings or inputs")
            if node.threads and str(values.get("device")).startswith("cpu") and values.get("threads") != node.threads:
                return None
            self._install(node, stored)
            return values

    def _read(self, node: Node, name: str) -> StoredArtifact:
        return StoredArtifact.parse(node, name, self._objects.read(name, stored_artifact.LARGEST_BYTES) or b"")

    def _install(self, node: Node, stored: StoredArtifact) -> None:
        """Download and publish an artifact."""
        from mlxflow.tasks import packed_record

        terminal.say(f"{node.task}: is in the store, {describe(stored.values)}")
        try:
            with packed_record.installing(node, stored.values, self._url) as private:
                for name, (size, content) in stored.files.items():
                    target = private / Path(name).relative_to(node.folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if not self._objects.download(blob_of(size, content), target):
                        raise _MissingError(name)
                    if damage := packed_record.damage_of(target, content):
                        raise UnusableArtifactError(f"{name} {damage}")
        except _MissingError as error:
            raise UnusableArtifactError(f"{error} of {node.task} is missing there") from None

    def push(self, node: Node, values: dict[str, Any], *, replace: bool = False) -> Pushed:
        """Upload the artifact of a stage: its files, and then its record.

        Args:
            node: the stage.
            values: its record, which matches the artifact.
            replace: upload everything again, and replace the record of an artifact with other bytes.

        Raises:
            StoreError: the store fails, or a file changed meanwhile; the store has the artifact whole or not at all.
            ArtifactError: the record is too large.
        """
        stored = StoredArtifact(node, values, self._card_of(node))
        files = {blob_of(*output): Path(node.path(name)) for name, output in stored.files.items()}
        document = stored.document()
        with self._naming():
            name = self._name(node, values["inputs"])
            there = self._outputs_there(node, name)
            if not replace and there and there != values["outputs"]:
                if all(self._objects.has(blob_of(*output)) for output in there.values()):
                    return Pushed(is_new=False, differs=True)
                replace = True
            replace = replace or there == {}
            check = partial(self._require_unchanged, node, stored.files)
            return Pushed(self._objects.publish(files, name, document, check, replace=replace))

    def _outputs_there(self, node: Node, name: str) -> dict[str, Any] | None:
        """Return the outputs of the record of a name in the store; empty for a damaged one, None if there is none."""
        if name not in self._objects.names(name.rpartition("/")[0]):
            return None
        try:
            outputs: dict[str, Any] = self._read(node, name).values["outputs"]
        except UnusableArtifactError:
            return {}
        return outputs

    def _require_unchanged(self, node: Node, files: dict[str, list[Any]]) -> None:
        for name, (_, content) in files.items():
            try:
                is_same = self._cache.digests(node.path(name)).content == content
            except (OSError, ValueError):
                is_same = False
            if not is_same:
                raise StoreError(f"{name} was changed while it was uploaded")

    def _card_of(self, node: Node) -> list[Any] | None:
        """Return size and content digest of an artifact's model card; None without one."""
        path = node.path(stored_artifact.card_name(node))
        try:
            return [os.stat(path).st_size, self._cache.digests(path).content]  # noqa: PTH116
        except (OSError, ValueError):
            return None

    def offer(self, node: Node, values: dict[str, Any]) -> None:
        """Note a stage that was built, to be uploaded when its record is saved; see `flush`."""
        if self.table and self.table.push == "auto" and self._uploads and _is_shared(node):
            self._built.append((node, values))

    def flush(self) -> None:
        """Upload the stages that were built; a failure is one line."""
        with self._turn:
            while self._built:
                node, values = self._built.pop(0)
                try:
                    pushed = self.push(node, values, replace=node.task in self._damaged)
                except MlxflowError as error:
                    advice = f"{node.task} was not uploaded. Later: doit push {node.task}"
                    terminal.say(f"{str(error).rstrip('.')}. {advice}")
                else:
                    terminal.say(f"{node.task}: {pushed_message(pushed, values)}")

    def _try_writing(self) -> None:
        """Find out before hours are spent whether uploads will be refused."""
        if self._uploads is not None or self.table is None:
            return
        self._uploads = self.table.push == "auto"
        if self._uploads:
            try:
                with self._naming():
                    self._objects.check_writable()
            except StoreError as error:
                self._uploads = False
                terminal.say(f"{str(error).rstrip('.')}. Stages that are built are not uploaded.")

    def foresee(self, planned: Sequence[StaleStage]) -> set[str]:
        """Return the stages, of those that will run, whose artifacts will be taken; a failure is one line.

        One that reads from a stage that will be built is not among them: the store may have its result, too.
        """
        taken: set[str] = set()
        if self.table is None or not self.table.pull:
            return taken
        try:
            with self._naming():
                for stale in planned:
                    if _is_shared(stale.node) and taken.issuperset(stale.upstream) and self._has(stale):
                        taken.add(stale.node.task)
        except StoreError as error:
            terminal.say(f"{str(error).rstrip('.')}. {_BUILT_HERE}")
        return taken

    def _has(self, stale: StaleStage) -> bool:
        if stale.is_forgotten:
            return False
        try:
            names = self._objects.names(self._folder(stale.node))
            if stale.upstream:  # whose files are not here yet
                return bool(names)
            return self._name(stale.node, observe_inputs(stale.node, self._cache)) in names
        except (OSError, ValueError):  # an input is missing or damaged
            return False

    def _name(self, node: Node, inputs: dict[str, str]) -> str:
        return f"{self._folder(node)}/{digest_json(inputs)}.record"

    def _folder(self, node: Node) -> str:
        from mlxflow.tasks.cache_key import named_key

        return f"{_KEYS}/{named_key(node, self._nodes, self._cache)}"

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Add the address of the store to its errors."""
        try:
            yield
        except StoreError as error:
            raise type(error)(f"{self._url}: {error}") from error


class _MissingError(Exception):
    """A file of an artifact is not in the store."""


def require_store(store: StageStore) -> None:
    """Refuse a command that needs a store.

    Raises:
        StoreError: the workflow has none.
    """
    if store.table is None:
        raise StoreError('[store]: missing from the workflow. Add it with a url such as "s3://bucket/path".')


def pushed_message(pushed: Pushed, values: dict[str, Any]) -> str:
    """Return what an upload did, in words."""
    if pushed.differs:
        return "the store keeps another result of the same settings and inputs. To replace it: doit push --replace"
    return f"uploaded, {describe(values)}" if pushed.is_new else "is in the store already"


def describe(values: dict[str, Any]) -> str:
    """Return the number of files of an artifact and their bytes, in words."""
    sizes = [size for size, _ in values["outputs"].values()]
    return f"{len(sizes)} file{'s' if len(sizes) > 1 else ''}, {sum(sizes):,} bytes"


def _is_shared(node: Node) -> bool:
    """Return whether an artifact is the same wherever it was made: not of a stage that measures its machine."""
    return node.bound_device is None
