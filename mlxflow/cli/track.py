"""`mlxflow track`: report stages that are built to experiment trackers."""

import argparse
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from mlxflow.cli.arguments import add_workflow
from mlxflow.messages import terminal
from mlxflow.messages.advice import advise_build
from mlxflow.messages.errors import ArtifactError, CallError
from mlxflow.storage import layout, paths, report_structs, unfinished_runs
from mlxflow.workflow.model import Stage, Workflow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow track`."""
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="such as train or quantize:q4; default: all built")
    add_workflow(parser)


def run(parsed: argparse.Namespace) -> int:
    """Report stages, and return 1 if a tracker failed.

    Raises:
        CallError: the workflow names no tracker, or there is no such stage.
        ArtifactError: a named stage is not built, or its report is damaged.
        WorkflowError: the workflow file has mistakes, or a tracker is not installed.
    """
    from mlxflow.tracking import reporting, request
    from mlxflow.workflow import stage_tracking
    from mlxflow.workflow.loader import load_workflow

    workflow = load_workflow(parsed.workflow)
    if not workflow.tracking.to:
        expected = 'expected trackers. Write [tracking] and to = ["tensorboard"] below it.'
        raise CallError(f"{paths.shown(workflow.path)}: tracking.to = []: {expected}")
    stage_tracking.require_trackers(workflow)
    stages = list(_chosen(workflow, parsed.stages))
    terminal.say(*stage_tracking.closing_lines_of(workflow.root))
    state = stage_tracking.state_folder(workflow.root)
    outcomes = []
    for stage in stages:
        asked = stage_tracking.request_of(workflow, _run_of(workflow, stage), ends_soon=False)
        path = asked.write(state)
        try:
            outcomes += reporting.report_run(path, asked, request.FINISHED, terminal.say)
        finally:
            path.unlink(missing_ok=True)
    failed = [one for one in outcomes if one.problem]
    terminal.say(*request.summary_lines([one for one in outcomes if not one.problem]))
    return 1 if failed else 0


def _chosen(workflow: Workflow, names: list[str]) -> Iterator[Stage]:
    """Yield the named stages, or all that are built."""
    for name in names:
        if not any(name in (stage.task, stage.name) for stage in workflow.stages):
            workflow.find(name)  # says which there are
    built = [stage for stage in workflow.stages if (workflow.root / stage.folder / layout.REPORT).is_file()]
    for stage in workflow.stages:
        if names and not {stage.task, stage.name}.isdisjoint(names) and stage not in built:
            raise ArtifactError(f"{paths.shown(workflow.root / stage.folder)}: missing. {advise_build(stage.task)}")
    if not built:
        raise ArtifactError(f"{paths.shown(workflow.artifacts)}: no stage is built. Run: mlxflow build")
    yield from (one for one in built if not names or not {one.task, one.name}.isdisjoint(names))


def _run_of(workflow: Workflow, stage: Stage) -> Any:
    """Return the run of a stage that is built, for trackers."""
    from mlxflow.tracking.tracked_run import settings_of
    from mlxflow.workflow import stage_tracking

    advice = advise_build(stage.task)
    report = workflow.root / stage.folder / layout.REPORT
    origin = report_structs.read_provenance(report, advice=advice)
    facts = report_structs.read_part(report, _Facts, advice=advice).run
    key = unfinished_runs.key_of(origin.settings_digest, origin.inputs_digest, facts.threads)
    config = _config_of(workflow, stage, origin.settings_digest)
    if config is None:
        terminal.say(f"tracking: {stage.task}: built with settings that are not known any more; they are left out")
    folder = workflow.root / stage.folder
    return stage_tracking.run_of(
        workflow,
        stage,
        key,
        settings_of(config or {}, seed=origin.seed, mlxflow=origin.mlxflow, mlx=origin.mlx),
        metrics=(folder / layout.METRICS,) if stage_tracking.has_metrics(stage) else (),
        started=_ended(facts.ended, report) - facts.seconds,
    )


def _config_of(workflow: Workflow, stage: Stage, digest: str) -> dict[str, Any] | None:
    """Return the table that a stage was built with: the workflow's if that is still the same, or the lock's.

    Args:
        workflow: the workflow.
        stage: one of its stages.
        digest: of all settings of the artifact.
    """
    from mlxflow.device import compute_device
    from mlxflow.tasks import lockfile
    from mlxflow.workflow.stage import settings_digest

    now = stage.settings() | compute_device.environment(stage.bound_device)
    locked = (
        lockfile.recorded(table) for table in lockfile.read(workflow.root / layout.LOCKFILE).tables.get(stage.task, [])
    )
    for settings in (now, *(record["settings"] for record in locked if record)):
        if settings_digest(settings) == digest:
            return dict(settings["config"])
    return None


class _RunPart(msgspec.Struct, frozen=True):
    """The part of a report's table `run` that says when a run was."""

    seconds: float
    threads: int | None = None
    ended: str | None = None


class _Facts(msgspec.Struct, frozen=True):
    run: _RunPart


def _ended(text: str | None, report: Path) -> float:
    """Return when a run ended, in seconds since 1970; reports of earlier versions do not say."""
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except ValueError:
        return report.stat().st_mtime
