"""The output files of a stage: list them, record their digests, and find changed or missing ones."""

import os
from collections.abc import Iterator
from typing import Any

from mlxflow.messages.os_errors import ABSENT, reason_of
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.model_files import decides
from mlxflow.workflow.stage_node import Node


def may_hold(node: Node, name: str) -> bool:
    """Return whether a file is part of a stage's artifact: an output, or another file that a model depends on."""
    inside = name.removeprefix(f"{node.folder}/")
    return name in node.outputs or (inside != name and decides(inside))


def files_in(node: Node) -> list[str]:
    """Return the names of the files in a stage's artifact folder, sorted, without hidden files and compiled Python.

    Raises:
        OSError: a folder of it cannot be read.
    """
    return sorted(_walk(node.path(node.folder), node.folder))


def _walk(place: str, name: str) -> Iterator[str]:
    try:
        entries = os.scandir(place)
    except ABSENT:  # missing files are reported one by one
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
    """Return size and content digest of every file of an artifact by name.

    Raises:
        OSError: an output is missing.
        ValueError: a safetensors file is damaged.
    """
    names = dict.fromkeys([*node.outputs, *(name for name in files_in(node) if may_hold(node, name))])
    return {name: [os.stat(node.path(name)).st_size, cache.digests(node.path(name)).content] for name in names}  # noqa: PTH116


def damaged_outputs(node: Node, record: dict[str, Any], cache: DigestCache, *, again: bool = False) -> Iterator[str]:
    """Yield a line for each file of an artifact that was changed, removed or added since its run.

    Args:
        node: the stage.
        record: of the run.
        cache: digests by path.
        again: read every file, even if its size and times are unchanged.
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
            status = os.stat(path)  # noqa: PTH116 - strings, not paths: this runs for every file of a no-op
            if status.st_size != size:
                yield f"{name} has {status.st_size:,} bytes instead of {size:,}"
            elif cache.digests(path, again=again, status=status).content != content:
                yield f"{name} was changed after the run"
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
            yield f"{name} was added after the run"
