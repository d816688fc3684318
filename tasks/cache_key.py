"""Keys for external caches, such as those of CI, that are known before anything is built."""

from collections.abc import Sequence

from mlxflow.storage.digests import DigestCache, digest_json
from mlxflow.storage.paths import record_name
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import observe_corpora, observe_settings


def cache_key(node: Node, nodes: Sequence[Node], cache: DigestCache) -> str:
    """Return a digest of everything that a stage depends on: settings and sources of itself and of earlier stages.

    Artifacts are not read, so that the key can be computed in a fresh checkout.

    Args:
        node: the stage.
        nodes: every stage.
        cache: digests by path.
    """
    makers = {name: maker for maker in nodes for name in maker.outputs}
    keys: dict[str, str] = {}

    def key_of(one: Node) -> str:
        if one.task not in keys:
            inputs: dict[str, str] = observe_corpora(one, cache)
            for name in one.inputs:
                maker = makers.get(name)
                identity = key_of(maker) if maker else cache.digests(one.path(name)).identity
                inputs[record_name(name, one.spellings)] = identity
            threads = [one.threads] if one.threads and one.uses_device else []
            keys[one.task] = digest_json([one.task, observe_settings(one), inputs, *threads])
        return keys[one.task]

    return key_of(node)


def named_key(node: Node, nodes: Sequence[Node], cache: DigestCache) -> str:
    """Return the key of a stage as `doit cache-key` prints it, with the stage's name before it."""
    return f"{node.task.replace(':', '-')}-{cache_key(node, nodes, cache)}"
