"""The stages of a workflow file, resolved once and remembered for as long as nothing they follow from has changed.

Reading the workflow means importing every stage and the library that checks types, which takes longer than all that
doit does when there is nothing to do. What was read is therefore kept beside doit's state, together with the exact
bytes of the workflow file and the stamps of the code; the files that sources name are looked up anew each time.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxflow.data.sources import BUILTINS, source_files
from mlxflow.identity import digest_json
from tasks.node import Node

_FORMAT = 3


def load_nodes(path: Path, state: Path) -> list[Node]:
    """Return the stages of a workflow file, each after the ones it reads from.

    Args:
        path: the workflow file.
        state: the folder for what is remembered between runs; nothing is written where it does not exist yet.

    Raises:
        UserError: the file has mistakes.
    """
    remembered = state / "graph.json"
    key = _key(path)
    nodes = _recall(remembered, key, path)
    if nodes is None:
        nodes, patterns = _resolve(path)
        if state.is_dir():
            _remember(remembered, key, nodes, patterns)
    return nodes


def _key(path: Path) -> str | None:
    """Return a digest of everything that the graph follows from, but for the sources; None without a file."""
    try:
        text = path.read_bytes().hex()
    except OSError:
        return None
    return digest_json([_FORMAT, text, str(path), list(_code_stamps())])


def _code_stamps() -> Iterator[list[int | str]]:
    """Yield name, size and time of every file that takes part in reading a workflow."""
    import mlxflow

    package = os.path.dirname(str(mlxflow.__file__))  # noqa: PTH120 - pathlib doubles the time of a no-op here
    for folder in (package, os.path.join(package, "stages"), os.path.join(package, "data"), os.path.dirname(__file__)):  # noqa: PTH118, PTH120
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if entry.name.endswith(".py"):
                    stat = entry.stat()
                    yield [entry.path, stat.st_size, stat.st_mtime_ns]


def _recall(remembered: Path, key: str | None, path: Path) -> list[Node] | None:
    """Return the remembered graph if it still holds, with its sources looked up anew."""
    try:
        stored = json.loads(remembered.read_bytes())
        if key is None or stored["key"] != key:
            return None
        nodes = [Node.from_json(value) for value in stored["nodes"]]
        patterns: dict[str, list[tuple[str, bool]]] = stored["patterns"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    recalled = []
    for node in nodes:
        asked = [one for one in patterns.get(node.task, ()) if one[0] not in BUILTINS]
        try:
            found = [source_files(pattern, path.parent) for pattern, _ in asked]
        except OSError:
            return None  # a folder may not be read: the full reading says it best
        if not all(files or not required for files, (_, required) in zip(found, asked, strict=True)):
            return None  # a source is gone: the full reading says it best
        names = dict.fromkeys(name.as_posix() for files in found for name in files)
        recalled.append(replace(node, inputs=(*names, *node.inputs), command=_command(node.task, path)))
    return recalled


def _command(task: str, path: Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "mlxflow", "run", task, "--workflow", str(path))


def _remember(
    remembered: Path, key: str | None, nodes: list[Node], patterns: dict[str, list[tuple[str, bool]]]
) -> None:
    """Keep the graph, without the files that sources name; a folder that cannot be written is left alone."""
    stored: dict[str, Any] = {"key": key, "patterns": patterns, "nodes": []}
    for node in nodes:
        files = tuple(name for name in node.inputs if not patterns.get(node.task))
        stored["nodes"].append(replace(node, inputs=files).as_json())
    temporary = remembered.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(stored))
        temporary.replace(remembered)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def _refuse_command_names(stages: set[str]) -> None:
    """Refuse stages that doit would take for a command of its own.

    Raises:
        WorkflowError: there are some; each is named.
    """
    from doit.doit_cmd import DoitMain

    from mlxflow.errors import WorkflowError

    if clashing := sorted(stages & set(DoitMain().get_cmds())):
        raise WorkflowError(
            *(f"{name}: is a doit command and cannot be a stage. Rename the stage." for name in clashing)
        )


def _resolve(path: Path) -> tuple[list[Node], dict[str, list[tuple[str, bool]]]]:
    """Read the workflow file; also return the sources of each stage, as written."""
    from mlxflow.stage import summary
    from mlxflow.workflow import load_workflow

    workflow = load_workflow(path)
    _refuse_command_names({one.name for one in workflow.stages})
    nodes = [
        Node(
            task=one.task,
            doc=summary(one.module),
            root=workflow.root,
            folder=one.folder.as_posix(),
            inputs=tuple(name.as_posix() for name in one.input_files),
            outputs=tuple(name.as_posix() for name in one.outputs),
            settings=one.settings(),
            command=_command(one.task, path),
            corpora=tuple(corpus.name for corpus in one.corpora),
            bound_device=one.bound_device,
            uses_device=getattr(one.module, "USES_DEVICE", True),
            copies={copy.as_posix(): original.as_posix() for copy, original in one.copies.items()},
        )
        for one in workflow.stages
    ]
    return nodes, {one.task: one.source_patterns for one in workflow.stages if one.source_patterns}
