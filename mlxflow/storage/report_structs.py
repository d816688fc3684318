"""Read and write report.toml through structs: the tables `stage` and `run`, and the base of the stages' figures.

The struct of each stage's figures is in `mlxflow/report/stage_reports`.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args

import msgspec
from msgspec import Meta

from mlxflow.messages.errors import ArtifactError
from mlxflow.storage import report_files

Count = Annotated[int, Meta(ge=0, le=2**62)]
Seconds = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

_MAX_LINES = 10


class ReportTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of a table in a report. A field with its default value is left out of the file."""


class StageReport(ReportTable, frozen=True):
    """Base of the figures of a stage: equal between equal runs, except a field `run`.

    A subclass may have a field `run` whose type is a `ReportTable`: the stage's own keys of the table `run`.
    """


class Provenance(ReportTable, frozen=True, kw_only=True):
    """The table `stage`: the origin of the artifact.

    Attributes:
        stage: the task, such as "quantize:q4".
        settings_digest: of everything that the stage depends on except its inputs.
        inputs_digest: of the content of its inputs.
        seed: of the workflow, in decimal digits.
        mlxflow: version.
        mlx: version.
    """

    stage: str
    settings_digest: str
    inputs_digest: str
    seed: str
    mlxflow: str
    mlx: str


class RunFacts(ReportTable, frozen=True, kw_only=True):
    """The part of the table `run` that every stage has: facts that may differ between two equal runs.

    Attributes:
        seconds: wall clock, from the start of the process.
        device: "gpu" or "cpu"; None for a stage that does not compute on MLX's device.
        device_name: of the device or the processor.
        system: operating system and architecture.
        python: version.
        peak_rss_bytes: most resident memory of the process.
        blas: library of matrix products; None for a stage without MLX.
        threads: of matrix products on the CPU; None elsewhere.
        ranks: processes that trained together; None for one.
        backend: of their communication; None for one process.
        peak_memory_bytes: most memory that MLX's arrays held; None for a stage without MLX.
        ended: when, in UTC, as ISO 8601 to the second; None in reports of earlier versions.
        files: names of the files that the run wrote, relative to the artifact; empty in reports of earlier versions.
    """

    seconds: Seconds
    device: str | None = None
    device_name: str
    system: str
    python: str
    peak_rss_bytes: Count
    blas: str | None = None
    threads: Count | None = None
    ranks: Count | None = None
    backend: str | None = None
    peak_memory_bytes: Count | None = None
    ended: str | None = None
    files: tuple[str, ...] = ()


F = TypeVar("F", bound=StageReport)
T = TypeVar("T", bound=msgspec.Struct)


class Report(NamedTuple, Generic[F]):
    """A whole report.toml.

    Attributes:
        stage: the origin of the artifact.
        figures: of the stage.
        run: facts that may differ between two equal runs, without the stage's own keys.
    """

    stage: Provenance
    figures: F
    run: RunFacts


def write(path: Path, report: "Report[Any]") -> None:
    """Write a report as TOML, keys in the order of the structs' fields.

    Args:
        path: of the file.
        report: the report; the stage's own keys of the table `run` come before the list of files.

    Raises:
        StageError: the file cannot be written.
    """
    report_files.write_report(path, as_table(report))


def as_table(report: "Report[Any]") -> dict[str, Any]:
    """Return a report as the table of its file."""
    figures = msgspec.to_builtins(report.figures)
    run = msgspec.to_builtins(report.run)
    files = {"files": run.pop("files")} if "files" in run else {}
    own = figures.pop("run", {})
    return {"stage": msgspec.to_builtins(report.stage), **figures, "run": run | own | files}


def read(path: Path, form: type[F], *, shown: str = "", advice: str) -> Report[F]:
    """Return the report in a file.

    Args:
        path: a report.toml.
        form: struct of the stage's figures.
        shown: the path for messages; empty for `path` itself.
        advice: the last sentence of a message, such as advise_build("train").

    Raises:
        ArtifactError: it is missing, damaged or does not match the struct; see `parse`.
    """
    return parse(report_files.read_report(path), form, shown=shown or str(path), advice=advice)


def read_provenance(path: Path, *, advice: str) -> Provenance:
    """Return the table `stage` of a report.

    Args:
        path: a report.toml.
        advice: the last sentence of a message.

    Raises:
        ArtifactError: the file is missing or damaged, or the table does not match its struct; see `parse`.
    """
    table = report_files.read_report(path).get("stage")
    return convert(table, Provenance, shown=str(path), prefix="stage.", advice=advice)


def read_part(path: Path, form: type[T], *, advice: str) -> T:
    """Return some keys of a report; the others are not checked, so that reports of other versions can be read.

    Args:
        path: a report.toml.
        form: struct of the keys, and of those of its tables, without `forbid_unknown_fields`.
        advice: the last sentence of a message.

    Raises:
        ArtifactError: the file is missing or damaged, a key is missing or has a wrong type.
    """
    try:
        return msgspec.convert(report_files.read_report(path), form)
    except msgspec.ValidationError as error:
        raise ArtifactError(f"{path}: {_line(error, '')}. {advice}") from error


def parse(table: Mapping[str, Any], form: type[F], *, shown: str, advice: str) -> Report[F]:
    """Convert the table of a report file to a report.

    Args:
        table: of a report.toml.
        form: struct of the stage's figures.
        shown: path of the file, for messages.
        advice: the last sentence of a message.

    Raises:
        ArtifactError: a key is missing or unknown, has a wrong type, or is a number that is not finite; each line names
            file and key.
    """
    figures, facts = _split(table, form)
    lines = problems(figures, form)
    for key, part, kind in (("stage", table.get("stage"), Provenance), ("run", facts, RunFacts)):
        lines += problems(part, kind, f"{key}.") if key in table else [f"{key}: missing"]
    if lines:
        raise ArtifactError(*(f"{shown}: {line}. {advice}" for line in dict.fromkeys(lines[:_MAX_LINES])))
    return Report(
        msgspec.convert(table["stage"], Provenance), msgspec.convert(figures, form), msgspec.convert(facts, RunFacts)
    )


def _split(table: Mapping[str, Any], form: type[StageReport]) -> tuple[dict[str, Any], object]:
    """Return the figures of a report, with the stage's own keys of `run`, and the other keys of `run`."""
    figures = {key: value for key, value in table.items() if key not in ("stage", "run")}
    run, own = table.get("run"), _own_keys(form)
    if not isinstance(run, dict):
        return figures, run
    if own and not own.isdisjoint(run):
        figures["run"] = {key: value for key, value in run.items() if key in own}
    common = RunFacts.__struct_fields__
    return figures, {key: value for key, value in run.items() if key in common or key not in own}


def _own_keys(form: type[StageReport]) -> frozenset[str]:
    """Return the stage's own keys of the table `run`."""
    kinds = [field.type for field in msgspec.structs.fields(form) if field.name == "run"]
    kinds += [one for kind in kinds for one in get_args(kind)]
    return frozenset(name for kind in kinds for name in getattr(kind, "__struct_fields__", ()))


def convert(table: object, form: type[T], *, shown: str, prefix: str, advice: str) -> T:
    """Convert a table inside of a report to a struct.

    Args:
        table: as TOML values.
        form: its struct.
        shown: path of the report, for messages.
        prefix: prefix of its keys in messages, such as "settings.".
        advice: the last sentence of a message.

    Raises:
        ArtifactError: it does not match the struct; see `parse`.
    """
    if lines := problems(table, form, prefix):
        raise ArtifactError(*(f"{shown}: {line}. {advice}" for line in lines[:_MAX_LINES]))
    return msgspec.convert(table, form)


def problems(table: object, form: type[msgspec.Struct], prefix: str = "") -> list[str]:
    """Return the problems of a table as lines `key: problem`; empty if it matches the struct.

    Every missing or unknown key of the table and of nested tables has a line; of other mistakes only the first one.

    Args:
        table: as TOML values.
        form: its struct.
        prefix: prefix of its keys, such as "settings.".
    """
    if not isinstance(table, dict):
        return [f"{prefix.rstrip('.')}: expected a table"]
    if lines := [*_wrong_keys(table, form, prefix)]:
        return lines
    try:
        msgspec.convert(table, form)
    except msgspec.ValidationError as error:
        return [_line(error, prefix)]
    return [f"{prefix}{key} = {value}: expected a finite number" for key, value in _not_finite(table, "")]


def _wrong_keys(table: Mapping[str, Any], form: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    """Yield a line for each key that is missing or unknown; a struct that writes its defaults needs every key."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(form)}
    needs_all = not form.__struct_config__.omit_defaults
    for name, field in fields.items():
        if name not in table:
            if field.required or needs_all:
                yield f"{prefix}{name}: missing"
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct) and isinstance(table[name], dict):
            yield from _wrong_keys(table[name], field.type, f"{prefix}{name}.")
    yield from (f"{prefix}{name}: unknown key" for name in table if name not in fields)


def _line(error: msgspec.ValidationError, prefix: str) -> str:
    """Return msgspec's message as `key: problem`."""
    what, _, where = str(error).partition(" - at `$.")
    where = where.rstrip("`")
    for begin, replacement in (
        ("Object missing required field `", "missing"),
        ("Object contains unknown field `", "unknown key"),
    ):
        if what.startswith(begin):
            key = what.removeprefix(begin).rstrip("`")
            return f"{prefix}{where}{'.' if where else ''}{key}: {replacement}"
    return f"{prefix}{where}: {what[:1].lower()}{what[1:]}"


def _not_finite(value: object, key: str) -> Iterator[tuple[str, float]]:
    """Yield key and value of every number that is not finite."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield key, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _not_finite(one, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _not_finite(one, f"{key}[{index}]")
