"""The device and the number of threads that computed an artifact, from its report."""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mlxflow.storage import report_structs


class _DeviceKeys(msgspec.Struct, frozen=True):
    """Of a report's table `run` the keys of the device; those of a stage that does not compute with MLX are None."""

    device: str | None = None
    device_name: str | None = None
    threads: int | None = None
    ranks: int | None = None
    backend: str | None = None


class _DeviceReport(msgspec.Struct, frozen=True):
    run: _DeviceKeys = _DeviceKeys()


class ReportDevice(NamedTuple):
    """What computed an artifact.

    Attributes:
        device: kind and name, such as "cpu: Apple M4"; "unknown" for a stage that does not compute with MLX.
        threads: of matrix products; None if the CPU did not compute them.
        ranks: processes that trained together and their backend, such as "2 (ring)"; empty for one.
    """

    device: str
    threads: int | None
    ranks: str = ""

    def record(self) -> dict[str, Any]:
        """Return the keys of the record of a run."""
        threads = {} if self.threads is None else {"threads": self.threads}
        return {"device": self.device} | threads | ({"ranks": self.ranks} if self.ranks else {})


def read_device(report: Path) -> ReportDevice:
    """Return what computed an artifact.

    Args:
        report: its report.toml.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    run = report_structs.read_part(report, _DeviceReport, advice="Remove it and build it again.").run
    if run.device is None or run.device_name is None:
        return ReportDevice("unknown", None)
    ranks = "" if run.ranks is None else f"{run.ranks} ({run.backend})"
    return ReportDevice(f"{run.device}: {run.device_name}", run.threads, ranks)
