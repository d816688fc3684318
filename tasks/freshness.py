"""Whether a stage is stale, and the fact that makes it so, in a user's words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxflow.data.sources import corpus_identity
from mlxflow.device.compute_device import environment
from mlxflow.storage import layout, model_files
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.paths import printable, record_name
from mlxflow.tasks.outputs import damaged_outputs
from mlxflow.tasks.records import FORGOTTEN, is_complete
from mlxflow.tasks.stage_node import Node

_FORGOTTEN = "forgotten by doit forget"
_OLDER = "its record is of an older version"


def observe_inputs(node: Node, cache: DigestCache) -> dict[str, str]:
    """Return the identity of every input by name.

    Raises:
        OSError: one is missing.
        ValueError: a safetensors file is damaged.
    """
    read = files_read(node)
    return {name: cache.digests(path).identity for name, path in read.items()} | observe_corpora(node, cache)


def files_read(node: Node) -> dict[str, str]:
    """Return where every file lies that a stage reads as of now, by the name under which it is recorded."""
    beside = (f"{folder}/{name}" for folder in node.beside for name in model_files.beside(Path(node.path(folder))))
    return {record_name(name, node.spellings): node.path(name) for name in (*node.inputs, *beside)}


def observe_corpora(node: Node, cache: DigestCache) -> dict[str, str]:
    """Return the identity of every corpus that a stage reads, by name."""
    return {name: corpus_identity(name, cache) for name in node.corpora}


def observe_settings(node: Node) -> dict[str, Any]:
    """Return everything that the artifact depends on beside its inputs, as JSON values."""
    return node.settings | environment(node.bound_device)


def reasons(
    node: Node, record: dict[str, Any], cache: DigestCache, *, leave_out: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield every fact that makes a stage stale; nothing when it is fresh.

    Args:
        node: the stage.
        record: what its last run left, empty where there was none.
        cache: digests by path.
        leave_out: artifact folders of which no input is looked at.
    """
    if not is_complete(record):
        yield "never built" if not record else _FORGOTTEN if FORGOTTEN in record else _OLDER
        return
    settings = observe_settings(node)
    if settings != record["settings"]:
        yield from _changed_settings(node.task, record["settings"], settings)
    if node.threads and record.get("device", "").startswith("cpu") and record.get("threads") != node.threads:
        yield f"workflow.threads: {record.get('threads', 'unknown')} -> {node.threads}"
    yield from damaged_outputs(node, record, cache)
    yield from _changed_inputs(node, record["inputs"], cache, leave_out)


def _changed_inputs(
    node: Node, before: dict[str, str], cache: DigestCache, leave_out: tuple[str, ...]
) -> Iterator[str]:
    left_out = tuple(f"{folder}/" for folder in leave_out)
    now: dict[str, str | None] = dict(observe_corpora(node, cache))
    for name, path in files_read(node).items():
        if name.startswith(left_out):
            continue
        try:
            now[name] = cache.digests(path).identity
        except (OSError, ValueError):
            now[name] = None
    for name in sorted(name for name in {*before, *now} if not name.startswith(left_out)):
        if name in now and name in before and now[name] == before[name]:
            continue
        shown = printable(name if name.startswith(f"{layout.ARTIFACTS}/") else f"source {name}")
        if name not in now:
            yield f"{shown} is gone"
        elif name not in before:
            yield f"{shown} is new"
        elif now[name] is None:
            yield f"{printable(name)} is missing or damaged"
        else:
            yield f"{shown} changed"


def _changed_settings(task: str, before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    names = {"version": "the stage's code", "seed": "workflow.seed", "mlx": "mlx", "device": "the device"}
    names["name"] = "workflow.name"
    for key in sorted({*before, *now}):
        if before.get(key) == now.get(key):
            continue
        if key == "config":
            yield from _changed_values(task.partition(":")[0], before.get(key), now.get(key))
        else:
            yield f"{names.get(key, key)}: {_toml(before.get(key))} -> {_toml(now.get(key))}"


def _changed_values(key: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*now, *(name for name in before if name not in now)]:
            if before.get(name) != now.get(name):
                yield from _changed_values(f"{key}.{name}", before.get(name), now.get(name))
    else:
        yield f"{key}: {_toml(before)} -> {_toml(now)}"


def _toml(value: Any) -> str:
    from mlxflow.workflow.config import toml_value

    return "nothing" if value is None else toml_value(value)
