"""The names that a dodo.py imports: doit's configuration and task creator for the workflow of the command line."""

from mlxflow.messages import advice, terminal
from mlxflow.storage import layout, paths
from mlxflow.tasks.search_path import search_project_last

search_project_last()  # before anything else is imported

# ruff: noqa: E402
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doit import get_var

from mlxflow.messages.errors import UserError
from mlxflow.storage.digests import DigestCache
from mlxflow.tasks.creator import configuration, tasks_of
from mlxflow.tasks.graph import load_nodes

_workflow = Path(paths.expand(get_var("workflow") or layout.WORKFLOW))
advice.name_workflow(layout.named_workflow(_workflow))
_state = layout.state_folder(_workflow.parent)
_cache = DigestCache(_state / layout.DIGESTS)
try:
    _nodes = load_nodes(_workflow, _state)
except UserError as error:
    terminal.say_error(error)
    raise SystemExit(error.exit_code) from None  # doit would print a traceback and exit with 3

DOIT_CONFIG = configuration(_nodes, _state)


def task_stages() -> Iterator[dict[str, Any]]:
    """Yield every stage."""
    yield from tasks_of(_nodes, _cache)
