"""A run as a tracker gets it: identity, settings, points and final figures."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

Scalar = str | int | float | bool

#: Prefix of the names of final figures among a run's metrics.
FINAL = "final/"

# Figures of a report beyond these many are left out
_MAX_FIGURES = 500


class TrackedRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one stage.

    Attributes:
        task: the stage, such as "quantize:q4".
        key: 12 hexadecimal digits for its settings and inputs: a run that resumes has the key of the one it continues.
        project: the tracker's project or experiment.
        workflow: name of the workflow.
        folder: where trackers keep local files unless their own variables say otherwise.
        started: when, in seconds since 1970.
        settings: of the stage, by dotted key.
        metrics: the files to read points from, the first that exists; none for a stage without.
        report: the finished run's report.toml.
    """

    task: str
    key: str
    project: str
    workflow: str
    folder: str
    started: float
    settings: dict[str, Scalar]
    metrics: tuple[str, ...] = ()
    report: str = ""

    @property
    def run_id(self) -> str:
        """A name for the run that is valid as a file name and in every tracker."""
        return f"{self.task.replace(':', '-')}-{self.key}"

    @property
    def kind(self) -> str:
        """The stage without its variant."""
        return self.task.partition(":")[0]

    @property
    def project_id(self) -> str:
        """The project with the characters replaced that wandb and trackio refuse."""
        return re.sub(r"[/\\#?%:\s]+", "-", self.project)[:128] or "mlxflow"

    def folder_of(self, tracker: str) -> Path:
        """Return the folder of a tracker's local files, which exists."""
        folder = Path(self.folder, tracker)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class CurvePoint(NamedTuple):
    """One number of a learning curve.

    Attributes:
        name: such as "train/loss".
        step: number of updates before it.
        value: finite.
        seconds: of training before it; None if the record has none.
    """

    name: str
    step: int
    value: float
    seconds: float | None


def points_of(line: bytes) -> Iterator[CurvePoint]:
    """Yield the numbers of a line of `metrics.jsonl`; none of a line that is not a record.

    Args:
        line: without its line break.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return
    if not isinstance(record, dict) or not isinstance(kind := record.get("kind"), str):
        return
    step, seconds = record.get("step"), _number(record.get("seconds"))
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return
    for name, value in flattened({name: value for name, value in record.items() if name not in ("kind", "step")}):
        if (number := _number(value)) is not None:
            yield CurvePoint(f"{kind}/{name}", step, number, seconds)


def _number(value: object) -> float | None:
    """Return a value as a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def flattened(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    """Yield the scalars of a nested table by dotted key; entries of a list by their name, or by their number."""
    for name, one in value.items():
        yield from _flattened_value(one, f"{prefix}{name}")


def _flattened_value(value: object, key: str) -> Iterator[tuple[str, Scalar]]:
    if isinstance(value, Mapping):
        yield from flattened(value, f"{key}.")
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _flattened_value(one, f"{key}.{_label(one, number)}")
    elif isinstance(value, str | int | float | bool):
        yield key, value


def _label(entry: object, number: int) -> str:
    """Return the label of an entry of a list."""
    named = [entry.get(key) for key in ("name", "model", "stage")] if isinstance(entry, Mapping) else []
    return next((name for name in named if isinstance(name, str) and name), str(number))


def settings_of(config: Mapping[str, Any], **facts: Scalar) -> dict[str, Scalar]:
    """Return the settings of a stage by dotted key; a list of scalars is one text.

    Args:
        config: its table, as JSON values.
        facts: further settings, such as the seed.
    """
    return {**dict(_with_lists_as_text(config, "")), **facts}


def _with_lists_as_text(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Scalar]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _with_lists_as_text(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", json.dumps(value)
        elif isinstance(value, str | int | float | bool):
            yield f"{prefix}{name}", value


def final_figures(report: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the figures of a report.toml by dotted key, without its origin and without settings.

    Args:
        report: the whole file as a table.
    """
    own = {name: value for name, value in report.items() if name not in ("stage", "run", "settings")}
    run = report.get("run")
    facts = {f"run.{name}": value for name, value in flattened(run) if not name.startswith("files")} if run else {}
    figures: Iterable[tuple[str, Scalar]] = [*flattened(own), *facts.items()]
    return dict(list(figures)[:_MAX_FIGURES])


def numbers_of(figures: Mapping[str, Scalar]) -> dict[str, float]:
    """Return the figures that are finite numbers."""
    numbers = ((name, _number(value)) for name, value in figures.items())
    return {name: number for name, number in numbers if number is not None}
