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
    inputs: dict[str, str] = observe_corpora(node, cache)
    for name in node.inputs:
        maker = makers.get(name)
        key = record_name(name, node.spellings)
        inputs[key] = cache_key(maker, nodes, cache) if maker else cache.digests(node.path(name)).identity
    threads = [node.threads] if node.threads and node.uses_device else []
    return digest_json([node.task, observe_settings(node), inputs, *threads])
