"""What a run would do, followed through the whole chain."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.freshness import reasons
from mlxflow.tasks.stage_node import Node

#: Returns what a stage's last run left, empty where there is no record.
Records = Callable[[str], dict[str, Any]]


class Planned(NamedTuple):
    """A stage that will run: the facts that make it stale, and the seconds that it took last time, if known."""

    node: Node
    reasons: list[str]
    seconds: float | None


def plan(
    nodes: Iterable[Node], records: Records, cache: DigestCache, is_ignored: Callable[[str], bool] = lambda task: False
) -> list[Planned]:
    """Return the stages that a run would run, in its order.

    A stage whose input comes from one that will run is taken to run too; it does not when that one comes out equal.

    Args:
        nodes: every stage, each after the ones it reads from.
        records: see `Records`.
        cache: digests by path.
        is_ignored: whether a stage, and with it all that read from it, does not run.
    """
    planned: list[Planned] = []
    makers: dict[str, str] = {}  # of the files that will be made anew
    ignored: set[str] = set()  # files of stages that do not run
    for node in nodes:
        if is_ignored(node.task) or ignored.intersection(node.inputs):
            ignored.update(node.outputs)
            continue
        renewed = frozenset(makers).intersection(node.inputs)
        record = records(node.task)
        folders = tuple(one.node.folder for one in planned)
        found = list(reasons(node, record, cache, leave_out=folders))
        found += dict.fromkeys(f"because {makers[name]} runs" for name in node.inputs if name in renewed)
        if found:
            planned.append(Planned(node, found, record.get("seconds")))
            makers.update(dict.fromkeys(node.outputs, node.task))
    return planned


def with_upstream(nodes: Iterable[Node], wanted: Iterable[str]) -> list[Node]:
    """Return the stages of the given names and all that they read from, in the order given.

    Args:
        nodes: every stage, each after the ones it reads from.
        wanted: names of stages or variants; `quantize` stands for all its variants.
    """
    names = set(wanted)
    needed: set[str] = set()
    chosen: list[Node] = []
    for node in reversed(list(nodes)):
        if node.task in names or node.task.partition(":")[0] in names or needed.intersection(node.outputs):
            chosen.append(node)
            needed.update(node.inputs)
    return chosen[::-1]
