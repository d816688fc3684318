"""The trackers by name, and what each of them does with a run."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from mlxflow.tracking.table import TrackerName
from mlxflow.tracking.tracked_run import CurvePoint, Scalar, TrackedRun


class OpenRun(Protocol):
    """A run that is open in a tracker. Every method may raise what the tracker's library raises.

    Attributes:
        known: the last step that the tracker has of each metric.
        known_of_all: the last step that it has of metrics that `known` lacks; -1 for none.
    """

    known: dict[str, int]
    known_of_all: int

    def log(self, points: Sequence[CurvePoint]) -> None:
        """Log points of steps that are not known."""
        ...

    def finish(self, figures: Mapping[str, Scalar] | None) -> str:
        """End the run and return how to see it.

        Args:
            figures: final ones; None for a run that was interrupted.
        """
        ...


def open_run(tracker: TrackerName, run: TrackedRun) -> OpenRun:
    """Open a run in a tracker, the same one for the same run; imports its library.

    Raises:
        CallError: the tracker is switched off or has no login.
    """
    match tracker:
        case "tensorboard":
            from mlxflow.tracking.tensorboard_run import TensorBoardRun

            return TensorBoardRun(run)
        case "wandb":
            from mlxflow.tracking.wandb_run import WandbRun

            return WandbRun(run)
        case "mlflow":
            from mlxflow.tracking.mlflow_run import MlflowRun

            return MlflowRun(run)
        case "trackio":
            from mlxflow.tracking.trackio_run import TrackioRun

            return TrackioRun(run)
