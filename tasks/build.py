"""Run doit on a `workflow.toml` without a `dodo.py`, for `mlxflow build`."""

import inspect
from collections.abc import Sequence
from typing import Any

from doit.cmd_base import NamespaceTaskLoader
from doit.doit_cmd import DoitMain


class _GraphLoader(NamespaceTaskLoader):  # type: ignore[misc]  # doit has no types
    """A doit loader that uses `mlxflow.tasks.dodo` in place of a `dodo.py`."""

    def setup(self, opt_values: dict[str, Any]) -> None:
        """Load the workflow that the command line names."""
        from mlxflow.tasks import dodo

        self.namespace = dict(inspect.getmembers(dodo))


class _Main(DoitMain):  # type: ignore[misc]
    BIN_NAME = "mlxflow build"


def run_doit(arguments: Sequence[str]) -> int:
    """Run one command of doit on the graph of a workflow file and return its exit code.

    Args:
        arguments: as after `doit`: a verb, `workflow=FILE`, options, stages.
    """
    return int(_Main(_GraphLoader()).run(list(arguments)) or 0)
