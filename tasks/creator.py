"""From a workflow to doit's tasks: one creator for every stage."""

import atexit
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from doit.dependency import FileChangedChecker
from doit.globals import Globals

from mlxflow.storage import layout
from mlxflow.storage.digests import DigestCache
from mlxflow.system import terminal
from mlxflow.tasks.adoption import Adoption
from mlxflow.tasks.doit_backend import BACKEND
from mlxflow.tasks.reporter import StageReporter
from mlxflow.workflow.stage_node import Node
from mlxflow.workflow.staleness import reasons

#: The most files that `doit clean` names of those that it leaves alone.
_MOST_NAMED = 5


class Freshness:
    """Answers doit's question whether a task is up to date, and keeps the reasons for whoever prints them.

    Attributes:
        reasons: what makes the stage stale, as of the last time doit asked.
    """

    #: doit asks for the signature of every task's object on every run; made once, that takes no time.
    __signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("task", "values")])

    def __init__(self, node: Node, cache: DigestCache) -> None:
        self._node = node
        self._cache = cache
        self.reasons: list[str] = []

    def __call__(self, task: Any, values: dict[str, Any]) -> bool:
        """Return whether the stage is fresh; doit passes what its last run saved."""
        self.reasons = list(reasons(self._node, values, self._cache))
        return not self.reasons


class InputChecker(FileChangedChecker):  # type: ignore[misc]  # doit has no types
    """Leave every question about files to `Freshness`, which asks by content and to say why a file cannot be read.

    doit itself takes any error for a file that is not there. See `mlxflow.tasks.doit_backend`.
    """

    def exists(self, file_path: str) -> bool:
        """Return True: `Freshness` has looked at every output."""
        return True

    def info(self, file_path: str) -> None:
        """Return nothing: `Freshness` has looked at every input."""

    def check_modified(self, file_path: str, file_stat: None, state: object) -> bool:
        """Return False: `Freshness` has said what there is to say."""
        return False

    def get_state(self, dep: str, current_state: object) -> None:
        """Return nothing: the record that counts is made by `mlxflow.tasks.doit_action`."""


def configuration(nodes: Sequence[Node], state: Path) -> dict[str, Any]:
    """Return doit's settings for a graph of stages.

    Args:
        nodes: the stages that a plain `doit` builds.
        state: the folder for what doit remembers.
    """
    return {
        "backend": BACKEND,
        "dep_file": str(state / layout.JOURNAL),
        "check_file_uptodate": InputChecker,
        "reporter": StageReporter,
        "default_tasks": [node.task for node in nodes],
    }


def tasks_of(nodes: Sequence[Node], cache: DigestCache) -> Iterator[dict[str, Any]]:
    """Yield doit's description of each stage, and of each group of variants."""
    from mlxflow.tasks.doit_action import StageAction

    journal = getattr(Globals.dep_manager, "backend", None)
    if journal is not None and hasattr(journal, "adopt"):  # not where a dodo.py chooses a backend of its own
        journal.adopt = Adoption(nodes, cache)
    atexit.register(cache.save)  # once: what is lost to a crash is read again
    grouped: set[str] = set()
    known = {node.task for node in nodes}
    for node in nodes:
        name, _, variant = node.task.partition(":")
        if variant and name not in grouped:
            grouped.add(name)
            yield {"basename": name, "name": None, "doc": node.doc}
        freshness = Freshness(node, cache)
        shown = _shown_paths(node.root)
        yield {
            "basename": name,
            **({"name": variant} if variant else {}),
            "doc": node.doc,
            "actions": [StageAction(node, cache, known)],
            "file_dep": [shown(path) for path in node.inputs],
            "targets": [shown(path) for path in node.outputs],
            "uptodate": [freshness],
            "clean": [(remove_artifact, (node,))],
            "meta": {"freshness": freshness, "node": node, "cache": cache},
            "verbosity": 2,
        }


@functools.cache
def _shown_paths(root: Path) -> Callable[[str], str]:
    """Return a function from names below the workflow's folder to paths that doit understands from here."""
    prefix = os.path.relpath(root)
    return (lambda name: name) if prefix == "." else (lambda name: os.path.join(prefix, name))  # noqa: PTH118


def remove_artifact(node: Node, dryrun: bool) -> int:
    """Remove a stage's artifact, and say so; files in its folder that no run of it wrote stay, and are named.

    Returns:
        the bytes that were freed.
    """
    from mlxflow.storage.ownership import remove_own_files
    from mlxflow.storage.unfinished_runs import size_of

    folder = node.root / node.folder
    if not folder.exists():
        return 0
    before = size_of(folder)
    terminal.show(f"{node.task} - removing {node.folder}")
    if not dryrun:
        for name in (kept := remove_own_files(folder, node.output_names))[:_MOST_NAMED]:
            terminal.show(f"{node.folder}/{name}: left alone, {node.task} did not write it")
        if len(kept) > _MOST_NAMED:
            terminal.show(f"{node.folder}: {len(kept) - _MOST_NAMED:,} more files left alone")
        for name in node.copies:
            (node.root / name).unlink(missing_ok=True)
        Globals.dep_manager.remove(node.task)
    return 0 if dryrun else before - (size_of(folder) if folder.exists() else 0)
