"""Records from `mlxflow.lock`, for artifacts that were copied without the folder of doit's state.

The lock file has the same data as a record: settings, identities of inputs, digests of outputs. If every output that it
lists is on the disk with that digest, it describes the artifact, and staleness is decided as with any other record.
"""

import os
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from mlxflow.storage import layout
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.paths import printable
from mlxflow.system.os_errors import ABSENT
from mlxflow.tasks import lockfile
from mlxflow.tasks.lockfile import Lock, Table
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import files_read


class Adoption:
    """Returns records of stages that are not in the journal.

    Args:
        nodes: every stage.
        cache: digests by path.
    """

    def __init__(self, nodes: Iterable[Node], cache: DigestCache) -> None:
        self._nodes = {node.task: node for node in nodes}
        self._cache = cache

    def __call__(self, task: str) -> dict[str, Any] | None:
        """Return the record of a stage if the lock file describes its artifact, else None.

        Raises:
            OSError: a file of the artifact, or the lock file, cannot be read.
        """
        node = self._nodes.get(task)
        if node is None or not all(_is_there(node.path(name)) for name in node.outputs[:1]):
            return None
        for table in self._lock.tables.get(task, []):
            if (record := self._record(node, table)) is not None:
                return record
        return None

    def settle_merge(self) -> str:
        """Remove merge conflict markers from the lock file; return a line about it, empty if there were none."""
        nodes = list(self._nodes.values())
        return lockfile.settle_merge(
            nodes[0].root / layout.LOCKFILE, nodes, lambda node, table: self._record(node, table) is not None
        )

    @cached_property
    def _lock(self) -> Lock:
        root = next(iter(self._nodes.values())).root
        return lockfile.read(root / layout.LOCKFILE)

    def _record(self, node: Node, table: Table) -> dict[str, Any] | None:
        record = lockfile.recorded(table)
        if record is None or not set(node.outputs) <= record["outputs"].keys():
            return None
        outputs: dict[str, list[Any]] = {}
        for name, content in record["outputs"].items():
            path = node.path(name)
            try:
                if self._cache.digests(path).content != content:
                    return None
                outputs[name] = [os.stat(path).st_size, content]  # noqa: PTH116
            except (*ABSENT, ValueError):  # missing or damaged
                return None
        names = {printable(name): name for name in files_read(node)}
        inputs = {names.get(name, name): identity for name, identity in record["inputs"].items()}
        return record | {"inputs": inputs, "outputs": outputs}


def _is_there(path: str) -> bool:
    """Return whether a path exists.

    Raises:
        OSError: it cannot be looked up.
    """
    try:
        os.stat(path)  # noqa: PTH116
    except ABSENT:
        return False
    return True
