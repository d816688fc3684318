"""Whether a stage is stale, and the fact that makes it so, in a user's words."""

import os
from collections.abc import Iterator
from typing import Any

from mlxflow.data.sources import corpus_identity
from mlxflow.device import environment
from mlxflow.identity import DigestCache
from tasks.node import Node


def observe_inputs(node: Node, cache: DigestCache) -> dict[str, str]:
    """Return the identity of every input by name.

    Raises:
        OSError: one is missing.
        ValueError: a safetensors file is damaged.
    """
    return {name: cache.digests(node.path(name)).identity for name in node.inputs} | observe_corpora(node, cache)


def observe_corpora(node: Node, cache: DigestCache) -> dict[str, str]:
    """Return the identity of every corpus that a stage reads, by name."""
    return {name: corpus_identity(name, cache) for name in node.corpora}


def observe_settings(node: Node) -> dict[str, Any]:
    """Return everything that the artifact depends on beside its inputs, as JSON values."""
    return node.settings | environment(node.bound_device)


def observe_outputs(node: Node, cache: DigestCache) -> dict[str, list[Any]]:
    """Return size and content digest of every output by name, as they are now."""
    paths = {name: node.root / name for name in node.outputs}
    return {name: [path.stat().st_size, cache.digests(path).content] for name, path in paths.items()}


def reasons(
    node: Node, record: dict[str, Any], cache: DigestCache, *, leave_out: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Yield every fact that makes a stage stale; nothing when it is fresh.

    Args:
        node: the stage.
        record: what its last run left, empty where there was none.
        cache: digests by path.
        leave_out: inputs that are not looked at.
    """
    if "outputs" not in record:
        yield "never built" if not record else "its record is of an older version"
        return
    settings = observe_settings(node)
    if settings != record["settings"]:
        yield from _changed_settings(node.task, record["settings"], settings)
    yield from damaged_outputs(node, record, cache)
    yield from _changed_inputs(node, record["inputs"], cache, leave_out)


def damaged_outputs(node: Node, record: dict[str, Any], cache: DigestCache, *, again: bool = False) -> Iterator[str]:
    """Yield what is wrong with the files that a run left.

    Args:
        node: the stage.
        record: what the run left.
        cache: digests by path.
        again: read every file, whatever the file system says of it.
    """
    for name in (*node.outputs, *node.copies):
        original = node.copies.get(name, name)
        if original not in record["outputs"]:
            yield f"{name} is new among its files"
            continue
        size, content = record["outputs"][original]
        path = node.path(name)
        try:
            found = os.stat(path).st_size  # noqa: PTH116 - strings, not paths: this runs for every file of a no-op
            if found != size:
                yield f"{name} has {found:,} bytes, the run left {size:,}"
            elif cache.digests(path, again=again).content != content:
                yield f"{name} is not what the run left"
        except FileNotFoundError:
            yield f"{name} is missing"
        except (OSError, ValueError) as error:
            yield f"{name} cannot be read ({error})"


def _changed_inputs(node: Node, before: dict[str, str], cache: DigestCache, leave_out: frozenset[str]) -> Iterator[str]:
    now: dict[str, str | None] = dict(observe_corpora(node, cache))
    for name in node.inputs:
        if name in leave_out:
            continue
        try:
            now[name] = cache.digests(node.path(name)).identity
        except (OSError, ValueError):
            now[name] = None
    for name in sorted({*before, *now} - leave_out):
        if name not in now:
            yield f"source {name} is gone"
        elif name not in before:
            yield f"source {name} is new"
        elif now[name] is None:
            yield f"{name} is missing or damaged"
        elif now[name] != before[name]:
            yield f"{name if name.startswith('artifacts/') else 'source ' + name} changed"


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
    from mlxflow.config import toml_value

    return "nothing" if value is None else toml_value(value)
