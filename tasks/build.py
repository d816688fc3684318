"""The graph of a `workflow.toml` built by doit without a `dodo.py`: `mlxflow build`."""

import inspect
from collections.abc import Sequence
from typing import Any

from doit.cmd_base import NamespaceTaskLoader
from doit.doit_cmd import DoitMain


class _GraphLoader(NamespaceTaskLoader):  # type: ignore[misc]  # doit has no types
    """Takes for dodo.py the module that a dodo.py of two lines imports from."""

    def setup(self, opt_values: dict[str, Any]) -> None:
        """Read the workflow, once doit knows which one the command line names."""
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
