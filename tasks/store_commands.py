"""The commands push and pull: exchange artifacts with the shared store of the workflow."""

from collections.abc import Sequence
from typing import Any

from mlxflow.messages import terminal
from mlxflow.messages.advice import advise_build
from mlxflow.messages.errors import MlxflowError
from mlxflow.storage import layout
from mlxflow.tasks.selection import Selection, refuse, with_upstream
from mlxflow.tasks.verb import StageVerb
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import StaleStage

_REPLACE = {
    "name": "replace",
    "long": "replace",
    "type": bool,
    "default": False,
    "help": "upload everything again, and replace what the store has of the same settings and inputs",
}


class Push(StageVerb):
    """`doit push`."""

    name = "push"
    doc_purpose = "upload fresh artifacts to the store of the workflow"
    doc_usage = "[STAGE ...]"
    cmd_options = (_REPLACE,)

    def _execute(self, replace: bool, pos_args: list[str]) -> int:
        from mlxflow.tasks.stage_store import pushed_message, require_store

        graph = Selection(self)
        require_store(graph.store)
        with self.alone(reads=True):
            wanted = _shared(graph.select(pos_args))
            stale = {one.node.task: one for one in _stale(graph, wanted)}
            for node in wanted:
                if node.task in stale:
                    reasons = "; ".join(stale[node.task].reasons)
                    terminal.show(f"{node.task}: not uploaded, it is stale ({reasons}). {advise_build(node.task)}")
                    continue
                record = graph.fresh_record(node)
                try:
                    pushed = graph.store.push(node, record, replace=replace)
                except MlxflowError as error:
                    refuse(str(error), error.exit_code)
                terminal.show(f"{node.task}: {pushed_message(pushed, record)}")
        return int(bool(pos_args and stale.keys() & {node.task for node in wanted}))


class Pull(StageVerb):
    """`doit pull`."""

    name = "pull"
    doc_purpose = "take stale artifacts, and those that they are made from, from the store of the workflow"
    doc_usage = "[STAGE ...]"

    def _execute(self, pos_args: list[str]) -> int:
        from mlxflow.tasks.stage_store import describe, require_store

        graph = Selection(self)
        require_store(graph.store)
        selected = graph.select(pos_args)
        lacking: list[str] = []
        with self.alone(makes=True):
            wanted = with_upstream(graph.nodes, [one.task for one in selected])
            for node in _shared([node for node in wanted if _stale_by_itself(graph, node)]):
                values = self._fetch(graph, node)
                if values is None:
                    lacking.append(node.task)
                else:
                    terminal.show(f"{node.task}: taken, {describe(values)}")
        for task in lacking:
            terminal.show(f"{task}: is not in the store. {advise_build(task)}")
        if not lacking:
            terminal.show("every stage that is shared is fresh")
        return int(bool(lacking and pos_args))

    def _fetch(self, graph: Selection, node: Node) -> dict[str, Any] | None:
        """Install an artifact and write its record; None if the store does not have it."""
        from mlxflow.tasks import lockfile

        try:
            values = graph.store.fetch(node)
        except MlxflowError as error:
            refuse(str(error), max(2, error.exit_code))
        if values is not None:
            known = {one.task for one in graph.nodes}
            if line := lockfile.update(node.root / layout.LOCKFILE, node, values, known):
                terminal.say(line)
            graph.journal.set(node.task, "_values_:", values)
            graph.journal.set(node.task, "deps:", [])
        return values


def _shared(nodes: Sequence[Node]) -> list[Node]:
    """Return the stages whose artifacts are shared, and print which are not."""
    for node in nodes:
        if node.bound_device is not None:
            terminal.show(f"{node.task}: measures the machine, and is not shared.")
    return [node for node in nodes if node.bound_device is None]


def _stale(graph: Selection, wanted: Sequence[Node]) -> list[StaleStage]:
    from mlxflow.workflow.staleness import find_stale

    return find_stale(with_upstream(graph.nodes, [node.task for node in wanted]), graph.record, graph.cache)


def _stale_by_itself(graph: Selection, node: Node) -> bool:
    from mlxflow.workflow.staleness import reasons

    return any(reasons(node, graph.record(node.task), graph.cache))
