"""Select stages by name, and look up their records."""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from doit.cmd_base import DoitCmdBase

from mlxflow.messages import terminal
from mlxflow.messages.advice import advise_build
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.doit_backend import Journal
from mlxflow.tasks.stage_store import StageStore
from mlxflow.workflow.records import is_complete
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import report_of


class Selection:
    """The stages of a command's graph, with their records.

    Attributes:
        nodes: every stage, each after the ones it reads from.
        cache: digests by path.
        store: where artifacts are shared.
    """

    def __init__(self, command: DoitCmdBase) -> None:
        metas = [task.meta for task in command.task_list if task.meta and "node" in task.meta]
        if not metas:
            refuse(f"{command.name}: needs the stages of a workflow.toml; this dodo.py has none.")
        self.nodes: list[Node] = [meta["node"] for meta in metas]
        self.cache: DigestCache = metas[0]["cache"]
        self.store: StageStore = metas[0]["store"]
        self.journal: Journal = command.dep_manager.backend

    def record(self, task: str) -> dict[str, Any]:
        """Return the record of a stage's last run; empty if there is none."""
        return self.journal.get(task, "_values_:") or {}

    def is_ignored(self, task: str) -> bool:
        """Return whether a stage is ignored by `doit ignore`."""
        return bool(self.journal.get(task, "ignore:"))

    def select(self, names: list[str]) -> list[Node]:
        """Return the stages of the given names; all stages if there are none.

        Raises:
            SystemExit: a name is no stage; exit code 2, after a message.
        """
        for name in names:
            if not any(node.task == name or node.task.startswith(f"{name}:") for node in self.nodes):
                refuse(unknown_name_message(name, [node.task for node in self.nodes]))
        return [node for node in self.nodes if not names or node.task in names or node.task.partition(":")[0] in names]

    def one(self, names: list[str], usage: str) -> Node:
        """Return the one stage of the given name.

        Raises:
            SystemExit: not exactly one name, or it is no stage or several; exit code 2, after a message.
        """
        if len(names) != 1:
            refuse(f"expected one stage. Use: {usage}")
        chosen = self.select(names)
        if len(chosen) > 1:
            refuse(f"{names[0]}: has variants. Name one of {', '.join(node.task for node in chosen)}.")
        return chosen[0]

    def fresh_record(self, node: Node) -> dict[str, Any]:
        """Return the record of a stage after checking that its artifact is unchanged since its last run.

        Raises:
            SystemExit: there is no record, or the artifact is damaged; exit code 1, after a message.
        """
        from mlxflow.workflow.outputs import damaged_outputs

        record = self.record(node.task)
        if not is_complete(record):
            is_built = report_of(node) is not None
            what = "its artifact has no record of its run" if is_built else "never built here"
            refuse(f"{node.task}: {what}. {advise_build(node.task)}", 1)
        if damage := list(damaged_outputs(node, record, self.cache, again=True)):
            refuse(
                "\n".join([*damage, f"{node.task}: its artifact was changed after its run. {advise_build(node.task)}"]),
                1,
            )
        return record


def with_upstream(nodes: Iterable[Node], wanted: Iterable[str]) -> list[Node]:
    """Return the stages of the given names and all that they depend on, in the order of `nodes`.

    Args:
        nodes: every stage, each after the ones it reads from.
        wanted: names of stages or variants; a stage's name selects all its variants.
    """
    names = set(wanted)
    needed: set[str] = set()
    chosen: list[Node] = []
    for node in reversed(list(nodes)):
        if node.task in names or node.task.partition(":")[0] in names or needed.intersection(node.outputs):
            chosen.append(node)
            needed.update(node.inputs)
    return chosen[::-1]


def unknown_name_message(name: str, known: Sequence[str], kind: str = "stage") -> str:
    """Return the message for an unknown name.

    Args:
        name: as written.
        known: the valid names.
        kind: of thing, for the message.
    """
    from difflib import get_close_matches

    from mlxflow.workflow.loader import STAGES

    if kind == "stage" and name in STAGES and not any(one.startswith(f"{name}:") for one in known):
        return (
            f"{name}: the workflow has no [{name}] table, and no stage reads from it. Add it: its keys have defaults."
        )
    if near := get_close_matches(name, known, n=1):
        return f"{name}: no such {kind}. Did you mean {near[0]}?"
    return f"{name}: no such {kind}. Known: {', '.join(known)}."


def refuse(line: str, code: int = 2) -> NoReturn:
    """Print a message of one or more lines and exit."""
    terminal.say_last(*line.split("\n"))
    raise SystemExit(code)
