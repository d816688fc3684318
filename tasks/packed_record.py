"""The record of a stage outside of its folder, in an archive or in a shared store, and installing an artifact by it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlxflow.messages.byte_sizes import show_apart
from mlxflow.messages.errors import ArtifactError, StageError
from mlxflow.storage import atomic_folders
from mlxflow.storage.digests import digest_file
from mlxflow.storage.ownership import foreign_names
from mlxflow.storage.state_files import InvalidStateError, parse_json
from mlxflow.workflow.outputs import may_hold
from mlxflow.workflow.records import is_output, read_values
from mlxflow.workflow.stage_node import Node

#: The most bytes of a record.
LARGEST_BYTES = 32_000_000

_FORMAT = 1
# The most lists and tables in a record: a parsed one takes about 20 times the memory of its text.
_MOST_CONTAINERS = 500_000


class InvalidRecordError(ValueError):
    """A record is damaged, hostile, of another version or of no stage here; the message is what and what to do."""


def encode(node: Node, values: dict[str, Any], card: list[Any] | None = None) -> bytes:
    """Return the text of a stage's record; equal records are equal bytes.

    Args:
        node: the stage.
        values: its record.
        card: size and content digest of the model card, which no record has; None without one.

    Raises:
        ArtifactError: it is too large to be read again.
    """
    table = {"format": _FORMAT, "task": node.task, "values": values} | ({"card": card} if card else {})
    record = json.dumps(table, sort_keys=True).encode()
    if _is_too_large(record):
        raise ArtifactError(f"{node.task}: its record has {len(record):,} bytes, more than an archive can hold.")
    return record


def decode(data: bytes, nodes: dict[str, Node]) -> tuple[Node, dict[str, Any]]:
    """Return the stage and the record of a text; files outside of the stage's artifact are refused.

    Raises:
        InvalidRecordError: it cannot be used.
    """
    try:
        record = {} if _is_too_large(data) else parse_json(data)
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise InvalidRecordError("was packed by another version. Pack it again with this one.")
        task, values = record.get("task"), read_values(record.get("values"))
    except InvalidStateError as error:
        raise InvalidRecordError(f"its record is not valid ({error}). Pack it again.") from error
    if not isinstance(task, str) or task not in nodes:
        raise InvalidRecordError(f"holds {task!r}, which is no stage here. Known: {', '.join(nodes)}.")
    node, outputs = nodes[task], values["outputs"]
    if not set(node.outputs) <= outputs.keys() or not all(_may_write(node, name) for name in outputs):
        raise InvalidRecordError(f"holds other files than {task} writes here. Pack it again with this version.")
    return node, values


def card_in(data: bytes) -> list[Any] | None:
    """Return size and content digest of the model card that goes with a record; None without a valid one."""
    card = parse_json(data).get("card")
    return card if is_output(card) else None


def _is_too_large(record: bytes) -> bool:
    return len(record) > LARGEST_BYTES or record.count(b"[") + record.count(b"{") > _MOST_CONTAINERS


def _may_write(node: Node, name: str) -> bool:
    return may_hold(node, name) and not {"", ".", ".."}.intersection(name.split("/")) and "\0" not in name


@contextmanager
def installing(node: Node, values: dict[str, Any], source: str) -> Iterator[Path]:
    """Yield a private folder for the files of an artifact; it becomes the artifact if the block succeeds.

    Args:
        node: the stage.
        values: its record.
        source: of the files, for messages.

    Raises:
        StageError: the disk has too little space, or cannot be written; the old artifact is unchanged.
    """
    needed = sum(size for size, _ in values["outputs"].values())
    folder = node.root / node.folder
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if needed > free:
        wanted, left = show_apart(needed, free)
        raise StageError(f"{source}: needs {wanted}, {left} are free in {node.root}. Make room.")
    with atomic_folders.publishing(folder, partial(foreign_names, folder, node.output_names)) as private:
        yield private
    for copy, original in node.copies.items():
        atomic_folders.write_whole(node.root / copy, (node.root / original).read_bytes())


def damage_of(path: Path, content: str) -> str:
    """Return how a file differs from its content digest in a record, in words; empty if it does not."""
    try:
        return "" if digest_file(path).content == content else "is not what its record says"
    except ValueError as error:
        return f"is damaged ({error})"
