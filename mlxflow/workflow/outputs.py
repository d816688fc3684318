"""The files of an artifact: every one that its run left, and whether they are still that."""

import os
from collections.abc import Iterator
from typing import Any

from mlxflow.storage.digests import DigestCache
from mlxflow.storage.model_files import decides
from mlxflow.system.os_errors import ABSENT, reason_of
from mlxflow.workflow.stage_node import Node


def may_hold(node: Node, name: str) -> bool:
    """Return whether a file belongs to a stage's artifact: it has to write it, or it decides a model that it writes."""
    inside = name.removeprefix(f"{node.folder}/")
    return name in node.outputs or (inside != name and decides(inside))


def files_in(node: Node) -> list[str]:
    """Return the name of every file in a stage's artifact folder, sorted; hidden ones and compiled Python left out.

    Raises:
        OSError: a folder of it cannot be read.
    """
    return sorted(_walk(node.path(node.folder), node.folder))


def _walk(place: str, name: str) -> Iterator[str]:
    try:
        entries = os.scandir(place)
    except ABSENT:  # what lacks is said of each file
        return
    with entries:
        for entry in entries:
            if entry.name.startswith((".", "__pycache__")):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{name}/{entry.name}")
            else:
                yield f"{name}/{entry.name}"


def observe_outputs(node: Node, cache: DigestCache) -> dict[str, list[Any]]:
    """Return size and content digest of every file of an artifact by name, as they are now.

    Raises:
        OSError: one of those that the stage has to write is missing.
        ValueError: a safetensors file is damaged.
    """
    names = dict.fromkeys([*node.outputs, *(name for name in files_in(node) if may_hold(node, name))])
    return {name: [os.stat(node.path(name)).st_size, cache.digests(node.path(name)).content] for name in names}  # noqa: PTH116


def damaged_outputs(node: Node, record: dict[str, Any], cache: DigestCache, *, again: bool = False) -> Iterator[str]:
    """Yield what is wrong with the files that a run left, and each that was put beside them and would be read.

    Args:
        node: the stage.
        record: what the run left.
        cache: digests by path.
        again: read every file, whatever the file system says of it.
    """
    recorded: dict[str, Any] = record["outputs"]
    for name in dict.fromkeys([*node.outputs, *recorded, *node.copies]):
        original = node.copies.get(name, name)
        if original not in recorded:
            yield f"{name} is new among its files"
            continue
        size, content = recorded[original]
        path = node.path(name)
        try:
            found = os.stat(path)  # noqa: PTH116 - strings, not paths: this runs for every file of a no-op
            if found.st_size != size:
                yield f"{name} has {found.st_size:,} bytes, the run left {size:,}"
            elif cache.digests(path, again=again, found=found).content != content:
                yield f"{name} is not what the run left"
        except FileNotFoundError:
            yield f"{name} is missing"
        except (OSError, ValueError) as error:
            yield f"{name} cannot be read ({reason_of(error)})"
    try:
        names = files_in(node)
    except OSError as error:
        yield f"{node.folder} cannot be read ({reason_of(error)})"
        return
    for name in names:
        if name not in recorded and name not in node.outputs and may_hold(node, name):
            yield f"{name} was put there after the run"
