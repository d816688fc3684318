"""Create doit's tasks and configuration from the stages of a workflow."""

import atexit
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from doit.dependency import FileChangedChecker
from doit.globals import Globals

from mlxflow.messages import terminal
from mlxflow.storage import layout
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.adoption import Adoption
from mlxflow.tasks.doit_backend import BACKEND
from mlxflow.tasks.reporter import StageReporter
from mlxflow.tasks.stage_store import StageStore
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import reasons

#: The most files that `doit clean` lists as kept.
_MOST_NAMED = 5


class Freshness:
    """A task's `uptodate` object: decides whether the stage is fresh, and keeps the reasons for printing.

    Attributes:
        reasons: why the stage is stale, as of the last call.
    """

    #: doit inspects the signature of every task's object on every run; a given one saves that time.
    __signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("task", "values")])

    def __init__(self, node: Node, cache: DigestCache) -> None:
        self._node = node
        self._cache = cache
        self.reasons: list[str] = []

    def __call__(self, task: Any, values: dict[str, Any]) -> bool:
        """Return whether the stage is fresh; doit passes the values of its last run."""
        self.reasons = list(reasons(self._node, values, self._cache))
        return not self.reasons


class InputChecker(FileChangedChecker):  # type: ignore[misc]  # doit has no types
    """A file checker without checks: `Freshness` compares files by content and reports why one cannot be read.

    doit itself treats every error as a missing file. See `mlxflow.tasks.doit_backend`.
    """

    def exists(self, file_path: str) -> bool:
        """Return True: `Freshness` checks every output."""
        return True

    def info(self, file_path: str) -> None:
        """Return nothing: `Freshness` checks every input."""

    def check_modified(self, file_path: str, file_stat: None, state: object) -> bool:
        """Return False: `Freshness` has reported every change."""
        return False

    def get_state(self, dep: str, current_state: object) -> None:
        """Return nothing: `mlxflow.tasks.doit_action` makes the record."""


def configuration(nodes: Sequence[Node], state: Path) -> dict[str, Any]:
    """Return doit's settings for a graph of stages.

    Args:
        nodes: the stages that a plain `doit` builds.
        state: the folder of doit's state.
    """
    return {
        "backend": BACKEND,
        "dep_file": str(state / layout.JOURNAL),
        "check_file_uptodate": InputChecker,
        "reporter": StageReporter,
        "default_tasks": [node.task for node in nodes],
    }


def tasks_of(nodes: Sequence[Node], cache: DigestCache) -> Iterator[dict[str, Any]]:
    """Yield doit's task dictionary of each stage, and of each group of variants."""
    from mlxflow.tasks.doit_action import StageAction

    journal = getattr(Globals.dep_manager, "backend", None)
    if journal is not None and hasattr(journal, "adopt"):  # unless a dodo.py chooses another backend
        journal.adopt = Adoption(nodes, cache)
    atexit.register(cache.save)  # once, at the end: after a crash the files are read again
    grouped: set[str] = set()
    known = {node.task for node in nodes}
    store = StageStore(nodes, cache)
    for node in nodes:
        name, _, variant = node.task.partition(":")
        if variant and name not in grouped:
            grouped.add(name)
            yield {"basename": name, "name": None, "doc": node.doc}
        freshness = Freshness(node, cache)
        shown = _shown_paths(os.fspath(node.root))  # text: a path has a slow hash
        yield {
            "basename": name,
            **({"name": variant} if variant else {}),
            "doc": node.doc,
            "actions": [StageAction(node, cache, known, store)],
            "file_dep": [shown(path) for path in node.inputs],
            "targets": [shown(path) for path in node.outputs],
            "uptodate": [freshness],
            "clean": [(remove_artifact, (node,))],
            "meta": {"freshness": freshness, "node": node, "cache": cache, "store": store},
            "verbosity": 2,
        }


@functools.cache
def _shown_paths(root: str) -> Callable[[str], str]:
    """Return a function that maps names relative to the workflow's folder to paths from the current folder."""
    prefix = os.path.relpath(root)
    return (lambda name: name) if prefix == "." else (lambda name: os.path.join(prefix, name))  # noqa: PTH118


def remove_artifact(node: Node, dryrun: bool) -> int:
    """Remove a stage's artifact and print it; files in its folder that its runs did not write are kept and listed.

    Returns:
        the bytes freed.
    """
    from mlxflow.storage.ownership import remove_own_files
    from mlxflow.storage.unfinished_runs import size_of

    folder = node.root / node.folder
    if not folder.exists():
        return 0
    before = size_of(folder)
    terminal.show(f"{node.task} - removing {node.folder}")
    if not dryrun:
        for name in (foreign := remove_own_files(folder, node.output_names))[:_MOST_NAMED]:
            terminal.show(f"{node.folder}/{name}: left alone, {node.task} did not write it")
        if len(foreign) > _MOST_NAMED:
            terminal.show(f"{node.folder}: {len(foreign) - _MOST_NAMED:,} more files left alone")
        for name in node.copies:
            (node.root / name).unlink(missing_ok=True)
        Globals.dep_manager.remove(node.task)
    return 0 if dryrun else before - (size_of(folder) if folder.exists() else 0)
