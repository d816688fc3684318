"""The ranks of a workflow's training stages: `[workflow.distributed]` with its hostfile."""

from collections.abc import Iterator
from typing import NamedTuple

from mlxflow.distributed.backends import describe_ranks, resolve_backend
from mlxflow.distributed.hosts import Hostfile, backend_mistakes, read_hostfile
from mlxflow.distributed.rank import SCATTERING
from mlxflow.distributed.table import MAX_TIMEOUT_SECONDS, Distributed
from mlxflow.storage import paths
from mlxflow.storage.toml_tables import Problem, problem_message
from mlxflow.workflow.disk_queries import Disk


class Ranks(NamedTuple):
    """The ranks that train together.

    Attributes:
        table: `[workflow.distributed]`.
        device: the workflow's `device`.
        hosts: of the ranks; None if all are on this machine.
    """

    table: Distributed
    device: str
    hosts: Hostfile | None = None

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.hosts.hosts) if self.hosts else self.table.processes

    @property
    def number_here(self) -> int:
        """How many of them are on this machine."""
        return sum(host.is_here for host in self.hosts.hosts) if self.hosts else self.table.processes

    @property
    def backend(self) -> str:
        """What connects them."""
        return resolve_backend(self.table, self.device, self.hosts)

    @property
    def words(self) -> str:
        """Their number and their backend, such as "2 ranks (ring)"."""
        return describe_ranks(self.table, self.device, self.hosts)

    def cannot_scatter(self) -> Problem | None:
        """Return why the gradients of split layers cannot be added; None if they can, or no layers are split."""
        if self.table.sharding != "full":
            return None
        if self.backend not in SCATTERING:
            expected = f"the backend {self.backend} has no reduce-scatter; expected nccl or jaccl"
            return Problem("distributed.sharding", "full", expected, "Remove it, or use optimizer_sharding = true.")
        if self.table.reduction != "fast":
            expected = 'the backend adds the gradients of split layers, so reduction must be "fast"'
            return Problem("distributed.sharding", "full", expected, 'Add reduction = "fast".')
        return None

    def too_many(self, most: int, task: str, table: str) -> Problem | None:
        """Return the mistake of more ranks than forward passes in an update of a stage; None if there are not.

        Args:
            most: these passes; 0 for a stage that does not train.
            task: the stage.
            table: its key in the workflow file.
        """
        if not 0 < most < self.number:
            return None
        expected = f"expected at most {most}, the forward passes in an update of {task}"
        advice = f"or raise {table}.grad_accum_steps."
        if self.hosts:
            expected = f"{self.number} entries: {expected}"
            return Problem("distributed.hosts", self.table.hosts, expected, f"Remove entries, {advice}")
        return Problem("distributed.processes", self.table.processes, expected, f"Lower it, {advice}")


def read_ranks(table: Distributed, device: str, disk: Disk, *, shown: str, lines: list[str]) -> Ranks:
    """Return the ranks of a workflow; read its hostfile if it has one.

    Args:
        table: `[workflow.distributed]`.
        device: the workflow's `device`.
        disk: answers queries of files.
        shown: the workflow file's name, for messages.
        lines: gets a line for each mistake in the hostfile.
    """
    if not table.hosts:
        return Ranks(table, device)
    try:
        text = disk.hostfile(table.hosts)
    except OSError as error:
        expected = f"cannot be read ({error.strerror})"
        problem = Problem("distributed.hosts", table.hosts, expected, "Name a hostfile of mlx.distributed_config.")
        lines.append(problem_message(problem, shown, "workflow"))
        return Ranks(table, device)
    found, mistakes = read_hostfile(text, paths.shown(disk.root / paths.expand(table.hosts)))
    lines += mistakes
    if found is not None:
        lines += backend_mistakes(found, resolve_backend(table, device, found))
    return Ranks(table, device, found)


def table_problems(table: Distributed, device: str) -> Iterator[Problem]:
    """Yield a time out of range, ranks that are named twice, and GPUs that the device rules out."""
    if table.hosts and table.processes > 1:
        advice = "Remove one of the two."
        yield Problem("distributed.processes", table.processes, "hosts has an entry for each rank", advice)
    if not 0 < table.timeout_seconds <= MAX_TIMEOUT_SECONDS:
        bounds = "expected more than 0 s and at most 168 h"
        yield Problem("distributed.step_timeout", table.step_timeout, bounds, 'Use "10 min" (the default).')
    if table.sharding == "full" and table.optimizer_sharding:
        yield Problem("distributed.optimizer_sharding", True, 'sharding = "full" includes it', "Remove it.")
    if table.backend == "nccl" and device == "cpu":
        yield Problem("distributed.backend", "nccl", 'needs GPUs, and device = "cpu"', "Change one of the two.")
