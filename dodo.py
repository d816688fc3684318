"""The task graph of workflow.toml. `doit list` shows it, `doit` builds it; CONTRIBUTING.md says how it is made."""

from mlxflow.tasks.dodo import DOIT_CONFIG, task_stages

__all__ = ["DOIT_CONFIG", "task_stages"]
