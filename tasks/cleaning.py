"""What `doit clean` removes besides artifacts: unfinished runs, leftovers and outdated digests."""

from collections.abc import Sequence

from mlxflow.messages import terminal
from mlxflow.storage import layout, unfinished_runs
from mlxflow.storage.digests import DigestCache
from mlxflow.storage.unfinished_runs import Unfinished
from mlxflow.tasks.leftovers import advise_removal, find_leftovers, remove_leftover
from mlxflow.workflow.stage_node import Node


def remove_unfinished(node: Node, dryrun: bool) -> int:
    """Remove the files of a stage's unfinished runs, with any settings; print it and return the bytes freed."""
    runs = unfinished_runs.of_task(layout.state_folder(node.root), node.task)
    if runs:
        terminal.show(f"{node.task} - removing files of {len(runs)} unfinished runs ({_num_bytes(runs):,} bytes)")
    return 0 if dryrun else _remove(runs)


def remove_leftovers(nodes: Sequence[Node], *, is_wanted: bool, dryrun: bool) -> int:
    """Remove or list the artifacts of stages and variants that no longer exist; return the bytes freed.

    Args:
        nodes: every stage.
        is_wanted: remove them; else only list them.
        dryrun: print without removing.
    """
    root = nodes[0].root
    freed_bytes = 0
    for artifact in find_leftovers(root, nodes):
        terminal.show(f"removing {artifact.folder.as_posix()}" if is_wanted else artifact)
        if is_wanted and not dryrun:
            remove_leftover(root, artifact)
            freed_bytes += artifact.num_bytes
    left = unfinished_runs.of_no_task(layout.state_folder(root), [node.task for node in nodes])
    for run in left:
        folder = run.folder.relative_to(root).as_posix()
        advice = f"belongs to no stage ({run.num_bytes:,} bytes). {advise_removal()}"
        terminal.show(f"removing {folder}" if is_wanted else f"{folder}: {advice}")
    return freed_bytes + (_remove(left) if is_wanted and not dryrun else 0)


def freed_message(num_bytes: int, cache: DigestCache) -> str:
    """Drop digests of files that no longer exist; return a line about what was freed, empty if nothing was."""
    num_digests = cache.drop_missing()
    parts = [f"{num_bytes:,} bytes"] if num_bytes else []
    parts += [f"{num_digests:,} digests of removed files"] if num_digests else []
    return f"freed {' and '.join(parts)}" if parts else ""


def _num_bytes(runs: Sequence[Unfinished]) -> int:
    return sum(run.num_bytes for run in runs)


def _remove(runs: Sequence[Unfinished]) -> int:
    for one in runs:
        one.remove()
    return _num_bytes(runs)
