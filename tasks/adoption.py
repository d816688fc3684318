"""Records from `mlxflow.lock`, for artifacts that were copied without the folder of doit's state.

The lock file has the same data as a record: settings, identities of inputs, digests of outputs. If every output that it
lists is on the disk with that digest, it describes the artifact, and staleness is decided as with any other record. Of
measurements it lists names alone: such an artifact is described if its own report says that it was made by these
settings from these inputs.
"""

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxflow.messages.errors import ArtifactError
from mlxflow.messages.os_errors import ABSENT
from mlxflow.storage import layout
from mlxflow.storage.digests import DigestCache, digest_json
from mlxflow.storage.paths import printable
from mlxflow.storage.report_files import read_report
from mlxflow.tasks import lockfile
from mlxflow.tasks.lockfile import Lock, Table
from mlxflow.workflow.records import is_seconds
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
        record, measured = lockfile.recorded(table), lockfile.measured(table)
        if record is None or not set(node.outputs) <= {*record["outputs"], *measured}:
            return None
        names = {printable(name): name for name in files_read(node)}
        own = [name for name in measured if name.startswith(f"{node.folder}/")]
        inputs = {names.get(name, name): identity for name, identity in record["inputs"].items()}
        try:
            outputs = self._outputs(node, record["outputs"] | dict.fromkeys(own))
            inputs |= {
                name: self._cache.digests(node.path(name)).identity
                for name in (names.get(one, one) for one in measured if one not in own)
            }
        except (*ABSENT, ValueError):  # missing or damaged
            return None
        if outputs is None:
            return None
        report = f"{node.folder}/{layout.REPORT}"
        seconds = {"seconds": record["seconds"]} if "seconds" in record else _seconds_of(node.path(report))
        if report in measured and not _is_made_by(node.path(report), record["settings"], inputs):
            return None
        return record | {"inputs": inputs, "outputs": outputs, **seconds}

    def _outputs(self, node: Node, recorded: dict[str, str | None]) -> dict[str, list[Any]] | None:
        """Return size and content digest of each output; None if one has another digest than the recorded one.

        Raises:
            OSError: one cannot be read.
            ValueError: one is damaged.
        """
        outputs: dict[str, list[Any]] = {}
        for name, digest in recorded.items():
            path = node.path(name)
            digests = self._cache.digests(path)
            # Earlier versions recorded the content digest of a report, too
            known = digests if name.endswith(f"/{layout.REPORT}") else (digests.content,)
            if digest is not None and digest not in known:
                return None
            outputs[name] = [os.stat(path).st_size, digests.content]  # noqa: PTH116
        return outputs


def _is_made_by(report: str, settings: dict[str, Any], inputs: dict[str, str]) -> bool:
    """Return whether a report says that its artifact was made by settings and from inputs."""
    made = _table(report, "stage")
    digests = made.get("settings_digest"), made.get("inputs_digest")
    return digests == (digest_json(settings), digest_json(inputs))


def _seconds_of(report: str) -> dict[str, Any]:
    """Return the key `seconds` of a report's run, if it has one."""
    seconds = _table(report, "run").get("seconds")
    return {"seconds": seconds} if is_seconds(seconds) else {}


def _table(report: str, name: str) -> dict[str, Any]:
    """Return a table of a report; empty if it cannot be read."""
    try:
        table = read_report(Path(report)).get(name)
    except (ArtifactError, OSError):
        return {}
    return table if isinstance(table, dict) else {}


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
