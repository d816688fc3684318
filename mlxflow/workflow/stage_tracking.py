"""Report the stages of a workflow to the trackers of its table `[tracking]`."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlxflow.distributed.rank import of_this_process
from mlxflow.messages.advice import command
from mlxflow.messages.errors import WorkflowError
from mlxflow.storage import atomic_folders, layout, paths
from mlxflow.storage.toml_tables import problem_message
from mlxflow.tracking.live import Following, closing_lines
from mlxflow.tracking.request import TrackingRequest
from mlxflow.tracking.tracked_run import TrackedRun, settings_of
from mlxflow.workflow.model import Stage, Workflow


def require_trackers(workflow: Workflow) -> None:
    """Refuse trackers that are not installed.

    Raises:
        WorkflowError: a line for each.
    """
    shown = paths.shown(workflow.path)
    if lines := [problem_message(one, shown, "tracking") for one in workflow.tracking.missing()]:
        raise WorkflowError(*lines)


def state_folder(root: Path) -> Path:
    """Return the folder for requests to report a stage, in the state of the workflow in a folder."""
    return layout.state_folder(root) / layout.TRACKING


class TrackedStage:
    """A stage that is reported while it runs.

    Args:
        following: the process that does; None without trackers.
        is_live: whether it is of use before the stage has ended.
    """

    def __init__(self, following: Following | None, *, is_live: bool) -> None:
        self._following = following
        self._is_live = is_live

    def begin(self) -> None:
        """Start reporting; called when the folder that the stage writes into is there."""
        if self._following and self._is_live:
            self._following.begin()


@contextmanager
def tracked(
    workflow: Workflow, stage: Stage, provenance: Mapping[str, str], key: str, *, is_scratch: bool
) -> Iterator[TrackedStage]:
    """Report a stage that runs in the block; a failure of the report does not concern the stage.

    Args:
        workflow: the workflow.
        stage: one of its stages.
        provenance: of the run.
        key: of the run; a run that resumes has the one of the run that it continues.
        is_scratch: whether the artifact is written to another folder, and the run is not reported.
    """
    if is_scratch or not workflow.tracking.to or not of_this_process().is_first:
        yield TrackedStage(None, is_live=False)
        return
    folder = workflow.root / stage.folder
    metrics = has_metrics(stage)
    private = atomic_folders.private_folder(folder) / layout.METRICS
    run = run_of(
        workflow,
        stage,
        key,
        settings_of(stage.settings()["config"], **_facts(provenance)),
        metrics=(private, folder / layout.METRICS) if metrics else (),
        started=time.time(),
    )
    following = Following(request_of(workflow, run, ends_soon=True), state_folder(workflow.root))
    try:
        yield TrackedStage(following, is_live=metrics)
    finally:
        following.end(is_finished=sys.exc_info()[0] is None)


def has_metrics(stage: Stage) -> bool:
    """Return whether a stage writes a learning curve."""
    return any(path.name == layout.METRICS for path in stage.outputs)


def _facts(provenance: Mapping[str, str]) -> dict[str, str]:
    return {name: provenance[name] for name in ("seed", "mlxflow", "mlx")}


def run_of(
    workflow: Workflow,
    stage: Stage,
    key: str,
    settings: dict[str, Any],
    *,
    metrics: tuple[Path, ...],
    started: float,
) -> TrackedRun:
    """Return a run of a stage, for trackers.

    Args:
        workflow: the workflow.
        stage: one of its stages.
        key: of the run.
        settings: of the run, by dotted key.
        metrics: the files with its points.
        started: when, in seconds since 1970.
    """
    return TrackedRun(
        task=stage.task,
        key=key,
        project=workflow.tracking.project or workflow.settings.name,
        workflow=workflow.settings.name,
        folder=str((workflow.artifacts / layout.TRACKING).absolute()),
        started=started,
        settings=settings,
        metrics=tuple(str(path.absolute()) for path in metrics),
        report=str((workflow.root / stage.folder / layout.REPORT).absolute()),
    )


def request_of(workflow: Workflow, run: TrackedRun, *, ends_soon: bool) -> TrackingRequest:
    """Return the request to report a run to the trackers of a workflow."""
    return TrackingRequest(
        run=run,
        to=workflow.tracking.to,
        timeout_seconds=workflow.tracking.timeout_seconds,
        logs=str((workflow.artifacts / layout.LOGS).absolute()),
        advice=command(f"track {run.task}"),
        ends_soon=ends_soon,
    )


def closing_lines_of(root: Path) -> Iterator[str]:
    """Yield what was said of ended stages of the workflow in a folder; waits until all of them are reported."""
    yield from closing_lines(state_folder(root))
