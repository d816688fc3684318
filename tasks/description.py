"""The lines of `doit info` about a stage."""

from collections.abc import Iterable, Iterator

from mlxflow.tasks.selection import Selection
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import files_read, reasons


def describe(node: Node, graph: Selection, *, hide_status: bool) -> tuple[bool, list[str]]:
    """Return whether a stage is stale, and lines about it.

    Args:
        node: the stage.
        graph: has its record.
        hide_status: leave out whether it is stale, which requires reading its files.
    """
    why_stale = [] if hide_status else list(reasons(node, graph.record(node.task), graph.cache))
    lines = [node.task, f"    {node.doc}", ""]
    if not hide_status:
        state = "ignored" if graph.is_ignored(node.task) else "stale" if why_stale else "fresh"
        lines += [f"status: {state}", *(f"  - {reason}" for reason in why_stale)]
    lines += _last_run(graph.record(node.task))
    lines += _list("inputs", [*files_read(node), *node.corpora])
    lines += _list("outputs", [*node.outputs, *node.copies])
    return bool(why_stale), lines


def _last_run(record: dict[str, object]) -> Iterator[str]:
    if "seconds" in record:
        threads = f" ({record['threads']} threads)" if "threads" in record else ""
        yield f"last run: {record['seconds']:,} s on {record.get('device')}{threads}, commit {record.get('commit')}"


def _list(title: str, names: Iterable[str]) -> list[str]:
    return [f"{title}:", *(f"  - {name}" for name in names)]
