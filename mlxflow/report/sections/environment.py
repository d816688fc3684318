"""The environment section: machine, versions, seeds, commits, digests and settings."""

from collections.abc import Iterable, Sequence
from typing import Any

from mlxflow.report.elements import Block, Code, Note, Section, Table
from mlxflow.report.formatting import UNKNOWN, show_bytes
from mlxflow.report.load_run import LoadedStage, Run
from mlxflow.report.sections import beside
from mlxflow.storage import layout
from mlxflow.storage.report_structs import Report

_ABOUT = (
    ("device_name", "Device"),
    ("device", "Kind of device"),
    ("system", "System"),
    ("python", "Python"),
    ("blas", "BLAS"),
)
_VERSIONS = ("mlxflow", "mlx", "seed")


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("environment", "Environment and lock", beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    blocks: list[Block] = [_machine(run)]
    if run.lock_problem:
        blocks.append(Note(f"{layout.LOCKFILE} {run.lock_problem}: it is written when a stage is built."))
        return blocks
    blocks.append(_lock(run))
    for task, entry in run.lock.items():
        if isinstance(entry, dict) and entry.get("config"):
            blocks.append(Code(f"Settings of {task}", _toml(entry["config"])))
    return blocks


def _machine(run: Run) -> Table:
    """Return the machine facts of the stages; several values if they ran on several machines."""
    reports = [stage.report for stage in run.stages if stage.report]
    answers = [(words, _each_once(getattr(report.run, name) for report in reports)) for name, words in _ABOUT]
    answers += [(name, _each_once(getattr(report.stage, name) for report in reports)) for name in _VERSIONS]
    answers.append(("Ranks", _each_once(map(_ranks, reports))))
    cells = [(words, values) for words, values in answers if values]
    peaks = [(one.report.run.peak_rss_bytes, one.task) for one in run.stages if one.report]
    if peaks:
        cells.append(("Most memory of a process", f"{show_bytes(max(peaks)[0])} ({max(peaks)[1]})"))
    return Table("Machine and versions", ("What", "Value"), cells or [("Nothing was reported", UNKNOWN)], words=(0, 1))


def _ranks(report: "Report[Any]") -> str | None:
    return f"{report.run.ranks} ({report.run.backend})" if report.run.ranks else None


def _each_once(values: Iterable[str | None]) -> str:
    """Return the known values, each once."""
    return "; ".join(dict.fromkeys(value for value in values if value))


def _lock(run: Run) -> Table:
    head = ("Stage", "Commit", "Seed", "MLX", "Python", "Device", "Report's digest")
    cells = [_lock_row(stage, run.lock.get(stage.task, {})) for stage in run.stages]
    return Table(f"{layout.LOCKFILE}: what each stage was made of", head, cells, folded=True, words=(0, 1, 3, 4, 5, 6))


def _lock_row(stage: LoadedStage, entry: dict[str, object]) -> tuple[str, ...]:
    def told(key: str) -> str:
        return str(entry[key]) if key in entry else UNKNOWN

    outputs = entry.get("outputs")
    digest = outputs.get((stage.member.folder / layout.REPORT).as_posix()) if isinstance(outputs, dict) else None
    commit, _, changed = told("commit").partition("+")
    shown = commit[:12] + (f"+{changed}" if changed else "")
    return (stage.task, shown, told("seed"), told("mlx"), told("python"), told("device"), str(digest or UNKNOWN)[:12])


def _toml(config: object) -> str:
    import tomli_w

    try:
        return tomli_w.dumps(config) if isinstance(config, dict) else str(config)
    except (TypeError, ValueError):
        return str(config)
