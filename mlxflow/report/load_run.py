"""Load the reports, curves and timelines of one run; missing and unreadable files are reported on the page."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mlxflow.messages.advice import advise_build
from mlxflow.messages.errors import ArtifactError
from mlxflow.report import model_folder
from mlxflow.report.model_folder import ModelFolderFacts
from mlxflow.report.stage_reports.benchmark import BenchmarkReport
from mlxflow.report.stage_reports.evaluate import EvaluateReport
from mlxflow.report.stage_reports.export import ExportReport
from mlxflow.report.stage_reports.pretokenize import PretokenizeReport
from mlxflow.report.stage_reports.profile import ProfileReport
from mlxflow.report.stage_reports.quantize import QuantizeReport
from mlxflow.report.stage_reports.report import PageReport, SampleText
from mlxflow.report.stage_reports.train import TrainReport
from mlxflow.report.timelines import Timeline, read_cut_off, read_timeline
from mlxflow.storage import atomic_folders, layout, locks, model_files, report_structs, toml_text, unfinished_runs
from mlxflow.storage.report_structs import F, Provenance, Report, StageReport
from mlxflow.storage.run_context import Member

_LARGEST_BYTES = 256_000_000

_FORMS: dict[str, type[StageReport]] = {
    "pretokenize": PretokenizeReport,
    "train": TrainReport,
    "quantize": QuantizeReport,
    "export": ExportReport,
    "evaluate": EvaluateReport,
    "profile": ProfileReport,
    "benchmark": BenchmarkReport,
}


class LoadedStage(NamedTuple):
    """The files of one stage.

    Attributes:
        member: the stage.
        report: None if it is missing or cannot be read.
        state: fresh, stale, missing, damaged or running.
        said: the state in a sentence, with advice.
        size_bytes: of the artifact's files.
    """

    member: Member
    report: Report[Any] | None
    state: str
    said: str
    size_bytes: int

    @property
    def task(self) -> str:
        """The stage's name."""
        return self.member.task

    @property
    def kind(self) -> str:
        """The stage without its variant."""
        return self.member.task.partition(":")[0]

    def figures(self, form: type[F]) -> F | None:
        """Return the figures of the report; None without one or if it is of another stage."""
        own_figures = self.report.figures if self.report else None
        return own_figures if isinstance(own_figures, form) else None


class Curve(NamedTuple):
    """The lines of a `metrics.jsonl`, and the problem of the file if it has one."""

    records: list[dict[str, Any]]
    problem: str


class Run(NamedTuple):
    """One loaded run.

    Attributes:
        name: of the workflow.
        label: its letter beside another run on the same page; empty for a single run.
        stages: in the order of the workflow.
        curves: by task.
        timelines: by task.
        cut_off: by task, the timeline of a later run that did not finish.
        lock: `mlxflow.lock`, by task; empty without one.
        lock_problem: why it is empty.
        samples: generated texts from the report of the report stage.
        samples_problem: why there are none.
        models: by task, facts about the folder of each built model.
    """

    name: str
    label: str
    stages: list[LoadedStage]
    curves: dict[str, Curve]
    timelines: dict[str, Timeline]
    cut_off: dict[str, Timeline]
    lock: dict[str, Any]
    lock_problem: str
    samples: Sequence[SampleText]
    samples_problem: str
    models: dict[str, ModelFolderFacts]

    def of_kind(self, kind: str) -> list[LoadedStage]:
        """Return the stage of a name, or all its variants."""
        return [stage for stage in self.stages if stage.kind == kind]


def read_run(
    root: Path, members: Sequence[Member], *, name: str, label: str = "", samples: Sequence[SampleText] | None = None
) -> Run:
    """Load one run.

    Args:
        root: the workflow's folder.
        members: its stages, each after the ones it reads from, without the report stage.
        name: of the workflow.
        label: see `Run`.
        samples: generated texts; None for those of the report stage's last run.
    """
    is_in_use = locks.is_held(layout.state_folder(root) / layout.LOCK)
    stages = [_mark_running(root, _read_stage(root, member), is_in_use=is_in_use) for member in members]
    curves = {stage.task: read_curve(path) for stage in stages if (path := _metrics_of(root, stage)) is not None}
    timelines = {
        one.task: read_timeline(root / one.member.folder / layout.TIMELINE)
        for one in stages
        if _has(one, layout.TIMELINE, root)
    }
    cut_off = {one.task: left for one in stages if (left := _read_cut_off(root, one))}
    lock, lock_problem = read_toml(root / layout.LOCKFILE)
    if not lock_problem and not all(isinstance(table, dict) for table in lock.values()):
        lock, lock_problem = {}, "is not a lock of stages"
    samples_problem = ""
    if samples is None:
        samples, samples_problem = _recall_samples(root, stages)
    lock = {task: lock[task] for task in (one.task for one in stages) if task in lock}
    models = _look_at_models(root, stages, lock)
    return Run(name, label, stages, curves, timelines, cut_off, lock, lock_problem, samples, samples_problem, models)


def _look_at_models(root: Path, stages: Sequence[LoadedStage], lock: Mapping[str, Any]) -> dict[str, ModelFolderFacts]:
    """Return facts about the folder of each built model; the base is that of the stage it was made from."""
    models: dict[str, ModelFolderFacts] = {}
    for one in stages:
        if one.report is None or not (root / one.member.folder / model_files.CONFIG).is_file():
            continue
        config = lock.get(one.task, {}).get("config")
        found = model_folder.look_at(root, root / one.member.folder, config if isinstance(config, dict) else {})
        before = next((models[task] for task in one.member.reads if task in models), None)
        models[one.task] = found._replace(base=before.base, licence=before.licence) if before else found
    return models


def _mark_running(root: Path, stage: LoadedStage, *, is_in_use: bool) -> LoadedStage:
    """Return a stage with the state `running` where a process writes its next artifact."""
    if not is_in_use or not atomic_folders.private_folder(root / stage.member.folder).is_dir():
        return stage
    return stage._replace(state="running", said=f"{stage.task} is running; the page shows it so far.")


def _metrics_of(root: Path, stage: LoadedStage) -> Path | None:
    """Return the metrics of a stage: of the running stage, of the artifact, or of a run that was cut off."""
    unfinished = atomic_folders.private_folder(root / stage.member.folder) / layout.METRICS
    if stage.state == "running" or stage.report is None:
        if unfinished.is_file():
            return unfinished
        if stage.state == "running":
            return None
    return root / stage.member.folder / layout.METRICS if _has(stage, layout.METRICS, root) else None


def _read_cut_off(root: Path, stage: LoadedStage) -> Timeline | None:
    unfinished = unfinished_runs.stage_folder(layout.state_folder(root), stage.task)
    return read_cut_off(unfinished, root / stage.member.folder / layout.REPORT)


def _has(stage: LoadedStage, name: str, root: Path) -> bool:
    return (root / stage.member.folder / name).exists() and (
        not stage.member.outputs or any(path.name == name for path in stage.member.outputs)
    )


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """Return a TOML file's content, or an empty table and the reason."""
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            return {}, "is too large to be a report"
        return toml_text.loads(path.read_text(encoding="utf-8")), ""
    except FileNotFoundError:
        return {}, "is missing"
    except OSError as error:
        return {}, f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return {}, f"is damaged ({' '.join(str(error).split())})"


def _read_stage(root: Path, member: Member) -> LoadedStage:
    table, problem = read_toml(root / member.folder / layout.REPORT)
    size = sum(_size(root / path) for path in member.outputs)
    shown = (member.folder / layout.REPORT).as_posix()
    if problem == "is missing":
        message = f"{shown} is missing. {advise_build(member.task)}"
        return LoadedStage(member, None, "missing", message + _last_log_line(root, member.task), size)
    if problem:
        return LoadedStage(member, None, "damaged", f"{shown} {problem}. {advise_build(member.task)}", size)
    form = _FORMS.get(member.task.partition(":")[0], StageReport)
    try:
        report = report_structs.parse(table, form, shown=shown, advice=advise_build(member.task))
    except ArtifactError as error:
        return LoadedStage(member, None, "damaged", f"{_written_by(table)}{error.problems[0]}", size)
    if report.stage.mlxflow != version("mlxflow"):
        return LoadedStage(member, report, "stale", f"{shown} was written by mlxflow {report.stage.mlxflow}.", size)
    if member.stale:
        return LoadedStage(member, report, "stale", f"{member.task} is out of date: {member.stale}.", size)
    return LoadedStage(member, report, "fresh", "", size)


class _WriterVersion(msgspec.Struct, frozen=True):
    """The version in a report's table `stage`."""

    mlxflow: str


class _Written(msgspec.Struct, frozen=True):
    stage: _WriterVersion


def _written_by(table: Mapping[str, Any]) -> str:
    """Return a sentence if another version wrote a report, else an empty text."""
    try:
        made_by = msgspec.convert(table, _Written).stage.mlxflow
    except msgspec.ValidationError:
        return ""
    if made_by == version("mlxflow"):
        return ""
    return f"mlxflow {made_by} wrote a report that this version cannot read: "


def _last_log_line(root: Path, task: str) -> str:
    """Return the last line of a stage's log, if it has a log and no artifact."""
    try:
        with layout.log_file(root, task).open("rb") as log:
            log.seek(max(0, log.seek(0, 2) - 2000))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return f". Its last run ended with: {lines[-1]}" if lines else ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read_curve(path: Path) -> Curve:
    """Return the records of a `metrics.jsonl`; its `problem` says why some or all are missing."""
    records, bad = [], 0
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict):
                    records.append(record)
                else:
                    bad += 1
    except OSError as error:
        return Curve([], f"{path.parent.name}/{path.name} cannot be read ({error.strerror}).")
    problem = f"{path.parent.name}/{path.name}: {bad} of its lines cannot be read and are left out." if bad else ""
    return Curve(records, problem)


def _recall_samples(root: Path, stages: Sequence[LoadedStage]) -> tuple[Sequence[SampleText], str]:
    """Return the samples of the report stage's last run by the current models, and why others are left out."""
    shown = layout.stage_folder("report") / layout.REPORT
    read, problem = read_toml(root / shown)
    if problem:
        return [], f"No sample was generated yet. {advise_build('report')}"
    try:
        samples = report_structs.parse(
            read, PageReport, shown=shown.as_posix(), advice=advise_build("report")
        ).figures.samples
    except ArtifactError as error:
        return [], f"No sample is shown: {error.problems[0]}"
    known = {stage.task: model_key(stage.report.stage) for stage in stages if stage.report}
    current = [sample for sample in samples if known.get(sample.model) == sample.model_key]
    left_out = len(samples) - len(current)
    return current, f"{left_out} samples of earlier models are left out. {advise_build('report')}" if left_out else ""


def model_key(provenance: Provenance) -> str:
    """Return a key of a model's settings and inputs, to which a sample can be compared."""
    return f"{provenance.settings_digest}-{provenance.inputs_digest}"


def column(records: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return two columns of the records in which both are finite numbers, sorted by the first."""
    from mlxflow.report.formatting import number

    pairs = [(number(record.get(x)), number(record.get(y))) for record in records]
    known = sorted((a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(b))
    return [a for a, _ in known], [b for _, b in known]
