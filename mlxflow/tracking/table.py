"""The `[tracking]` table: to which experiment trackers the stages are reported. Imports no tracker."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mlxflow.storage.toml_tables import Problem

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]

#: The packages that each tracker needs; the extra has the tracker's name.
PACKAGES: dict[TrackerName, tuple[str, ...]] = {
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}


class Tracking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[tracking]` table: where figures go. It is no stage, and no key makes an artifact stale."""

    to: Annotated[
        tuple[TrackerName, ...],
        Meta(
            description="trackers that get one run for each stage, also while it trains; empty: none. Each is an extra "
            "of that name"
        ),
    ] = ()
    project: Annotated[
        str,
        Meta(
            max_length=128,
            description="the project of wandb and trackio, and the experiment of mlflow; empty: workflow.name",
        ),
    ] = ""
    timeout_seconds: Annotated[
        float,
        Meta(
            ge=1,
            le=3600,
            description="longest time that a tracker may take to answer, and to finish after a stage has ended; then "
            "it is ended, with a line, and the stage continues",
        ),
    ] = 30.0

    def problems(self) -> Iterator[Problem]:
        """Yield trackers that are named twice."""
        for number, name in enumerate(self.to):
            if name in self.to[:number]:
                yield Problem(f"to[{number}]", name, "named twice", "Remove one.")

    def missing(self) -> Iterator[Problem]:
        """Yield a problem for each tracker whose package is not installed."""
        for number, name in enumerate(self.to):
            if lacking := [package for package in PACKAGES[name] if not is_installed(package)]:
                advice = f"Run: pip install 'mlxflow[{name}]'."
                yield Problem(f"to[{number}]", name, f"needs {lacking[0]}, which is not installed", advice)


def is_installed(package: str) -> bool:
    """Return whether a package is installed; a folder of its name, such as wandb's own `wandb`, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
