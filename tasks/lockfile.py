"""`mlxflow.lock`: what each stage was made of, beside the workflow file, made to be committed."""

import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from mlxflow.paths import printable
from tasks.node import Node

NAME = "mlxflow.lock"

_writing = threading.Lock()


def describe(node: Node, values: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's table for the lock file.

    Args:
        node: the stage.
        values: its record.
    """
    settings = values["settings"]
    return {
        "seed": settings.get("seed", 0),
        "stage_version": settings.get("version", 0),
        "mlx": settings["mlx"],
        "python": platform.python_version(),
        "device": values.get("device", "unknown"),
        "commit": values.get("commit", "unknown"),
        "seconds": values["seconds"],
        "config": settings.get("config", {}),
        "inputs": {printable(name): content for name, content in values["inputs"].items()},
        "outputs": {name: content for name, (_, content) in values["outputs"].items()},
    }


def update(path: Path, node: Node, values: dict[str, Any], known: set[str]) -> None:
    """Write a stage's table into the lock file; tables of stages that are no more are left out.

    A file that cannot be read as TOML is begun anew, with a line about it.

    Args:
        path: the lock file.
        node: the stage.
        values: its record.
        known: the names of all stages of the workflow.
    """
    import tomli_w

    from mlxflow.artifact import write_whole

    with _writing:
        tables = {name: table for name, table in _read(path).items() if name in known}
        tables[node.task] = describe(node, values)
        head = "# What each stage was made of; written by doit, made to be committed.\n\n"
        write_whole(path, (head + tomli_w.dumps(_sorted(tables))).encode())


def _read(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        print(f"{path}: damaged ({error}). It is written anew.", file=sys.stderr)
        return {}


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return value


def source_commit(folder: Path) -> str:
    """Return the commit that a folder is at, with `+changes` where files differ from it; `unknown` without one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
