"""The stages of a workflow file, cached until something that they depend on changes.

Resolving a workflow imports every stage and the validation library, which takes longer than a whole no-op doit. The
graph is therefore cached beside doit's state, together with everything that it depends on: the bytes of the workflow
file, size and times of the code, and each query of the disk with its answer (`mlxflow.workflow.disk_queries`). If any
of these differs, the workflow is resolved again.
"""

import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxflow.storage import layout, state_files, temporary_files
from mlxflow.storage.digests import digest_json
from mlxflow.storage.state_files import InvalidStateError, OutdatedStateError
from mlxflow.storage.toml_text import MAX_WORKFLOW_BYTES
from mlxflow.workflow import disk_queries
from mlxflow.workflow.handover import Basis
from mlxflow.workflow.stage_node import Node

_FORMAT = 5


def load_nodes(path: Path, state: Path) -> list[Node]:
    """Return the stages of a workflow file, each after the ones it reads from.

    Args:
        path: the workflow file.
        state: the folder of doit's state; nothing is written if it does not exist yet.

    Raises:
        UserError: the file has mistakes.
    """
    cached = state / layout.GRAPH
    data = _read(path)
    key = _key(path, data)
    nodes = _recall(cached, key, path, data)
    if nodes is None:
        nodes = _resolve(path, data)
        if state.is_dir() and nodes and nodes[0].basis:
            lookups = nodes[0].basis.lookups
            _remember(cached, {"key": key, "code": _code_stamps(_code_files()), "lookups": lookups}, nodes)
    return nodes


def _read(path: Path) -> bytes | None:
    """Return the content of the workflow file; None if it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_WORKFLOW_BYTES:
            return None
        return path.read_bytes()
    except OSError:
        return None


def _key(path: Path, data: bytes | None) -> str | None:
    """Return a digest of the workflow file and of the location of the code; None if the file cannot be read."""
    import mlxflow

    if data is None:
        return None
    return digest_json([_FORMAT, data.hex(), str(path), sys.version, mlxflow.__file__, __file__])


def _code_files() -> list[str]:
    """Return every imported file of this project; resolving a workflow has imported all that it uses."""
    loaded = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    return sorted(file for name, file in loaded.items() if name.partition(".")[0] in ("mlxflow", "tasks") and file)


def _code_stamps(files: list[str]) -> list[list[int | str]]:
    """Return name, size and times of files.

    Raises:
        OSError: one is missing.
    """
    stats = [(file, os.stat(file)) for file in files]  # noqa: PTH116 - pathlib doubles the time of a no-op here
    return [[file, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for file, stat in stats]


def _recall(cached: Path, key: str | None, path: Path, data: bytes | None) -> list[Node] | None:
    """Return the cached graph if everything that it depends on is unchanged, else None."""
    try:
        stored = state_files.read(cached)
        if data is None or key is None or stored.get("key") != key:
            return None
        if stored["code"] != _code_stamps([os.fsdecode(stamp[0]) for stamp in stored["code"]]):
            return None
        nodes = [Node.from_json(value) for value in stored["nodes"]]
        if not disk_queries.unchanged(path.parent, stored["lookups"]):
            return None
        basis = Basis(data.decode(), stored["lookups"])
    except OutdatedStateError:
        return None
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        reason = error if isinstance(error, InvalidStateError) else "expected stages, stamps and questions"
        state_files.say_ignored(cached, reason, "The workflow is resolved again.")
        return None
    except OSError:  # the cache or a file of the code is missing
        return None
    return [replace(node, command=_command(node.task, path), basis=basis) for node in nodes]


def _command(task: str, path: Path) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "mlxflow", "run", task, f"--workflow={path}")


def _remember(cached: Path, basis: dict[str, Any], nodes: list[Node]) -> None:
    """Cache the graph with what it depends on; errors of writing are ignored."""
    temporary = temporary_files.beside(cached)
    try:
        temporary.write_bytes(state_files.encode(basis | {"nodes": [node.as_json() for node in nodes]}))
        temporary.replace(cached)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def _refuse_command_names(stages: set[str]) -> None:
    """Refuse stages with the name of a doit command.

    Raises:
        WorkflowError: names each such stage.
    """
    from doit.doit_cmd import DoitMain

    from mlxflow.messages.errors import WorkflowError

    if clashing := sorted(stages & set(DoitMain().get_cmds())):
        raise WorkflowError(
            *(f"{name}: is a doit command and cannot be a stage. Rename the stage." for name in clashing)
        )


def _resolve(path: Path, data: bytes | None) -> list[Node]:
    """Resolve a workflow file with the given content and return its stages."""
    from mlxflow.workflow.loader import load_workflow

    workflow = load_workflow(path, data=data)
    _refuse_command_names({one.name for one in workflow.stages})
    basis = None if data is None else Basis(data.decode(), workflow.disk.lookups)
    return [stage.node(_command(stage.task, path), basis) for stage in workflow.stages]
