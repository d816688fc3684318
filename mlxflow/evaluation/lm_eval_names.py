"""The names of lm-eval's tasks, listed once for each installation: lm-eval takes some 20 seconds to list them."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from mlxflow.messages import terminal
from mlxflow.storage import atomic_folders, state_files, user_folders
from mlxflow.storage.state_files import InvalidStateError

_FILE = "lm-eval-tasks.json"

# Run in a process of its own: the import takes seconds, and half a gigabyte with PyTorch
_SCRIPT = "import json; from lm_eval.tasks import TaskManager; print(json.dumps(TaskManager().all_tasks))"
_MOST_SECONDS = 300


def mistake(name: str) -> tuple[str, str] | None:
    """Return what is wrong with the name of a task, and what to do.

    Args:
        name: of a task, a group or a tag.

    Returns:
        None for a known name, and where lm-eval is not installed or does not list its tasks.
    """
    names = known_names()
    if names is None or name in names:
        return None
    import difflib

    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    advice = (
        f"Did you mean {near[0]}?" if near else "List them: lm_eval ls tasks. A file's name ends in .jsonl or .yaml."
    )
    return "is no task of lm-eval", advice


@cache
def known_names() -> frozenset[str] | None:
    """Return the names of all tasks, groups and tags; None if they are not known."""
    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        return None
    status = os.stat(spec.origin)  # noqa: PTH116
    try:
        key = [spec.origin, version("lm-eval"), status.st_size, status.st_mtime_ns]
        file = user_folders.cache_folder() / _FILE
        stored = state_files.read(file)
        if stored.get("key") == key:
            return frozenset(stored["names"])
    except PackageNotFoundError:
        return None
    except (FileNotFoundError, InvalidStateError):
        pass
    except (OSError, user_folders.NoFolderError):
        return None
    names = _listed()
    if names is not None:
        with suppress(OSError):
            atomic_folders.write_whole(file, state_files.encode({"key": key, "names": sorted(names)}))
    return names


def _listed() -> frozenset[str] | None:
    terminal.say("lm-eval: lists its tasks, which takes a while the first time")
    command = [sys.executable, "-P", "-c", _SCRIPT]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_MOST_SECONDS, check=True, env=environment
        )
        return frozenset(json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None  # the stage itself says why
