"""Several runs compared: their figures with the change against the first run, and the settings in which they differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mlxflow.report import charts
from mlxflow.report.elements import Block, Note, Section, Table, Text
from mlxflow.report.facts import epochs_of, facts
from mlxflow.report.formatting import UNKNOWN, clean, shorten
from mlxflow.report.load_run import LoadedStage, Run
from mlxflow.report.stage_reports.benchmark import BenchmarkReport
from mlxflow.report.stage_reports.profile import ProfileReport
from mlxflow.report.stage_reports.quantize import QuantizeReport
from mlxflow.report.stage_reports.train import TrainReport
from mlxflow.storage import layout
from mlxflow.storage.toml_tables import toml_value
from mlxflow.training.settings import Recomputation

_LONGEST_VALUE = 200

#: Keys of a stage's table in the lock that say how its artifact was made.
_MADE_BY = ("seed", "stage_version", "mlx", "python", "device", "threads")


class Measure(NamedTuple):
    """A figure of a run and the name of its form; see `charts.FORMATS`."""

    value: float
    form: str = "number"


def section(runs: Sequence[Run]) -> Section:
    """Return the section; without blocks for a single run."""
    blocks: list[Block] = []
    if len(runs) > 1:
        blocks = [_facts(runs), _deltas(runs), *_differences(runs)]
    return Section("comparison", "The runs compared", blocks)


def _facts(runs: Sequence[Run]) -> Table:
    known = [dict(facts(run)) for run in runs]
    names = dict.fromkeys(name for found in sorted(known, key=len, reverse=True) for name in found)
    rows = [(name, *(found.get(name, UNKNOWN) for found in known)) for name in names]
    head = ("What", *(run.label for run in runs))
    return Table("Each run", head, rows, words=tuple(range(len(head))))


def _deltas(runs: Sequence[Run]) -> Table:
    """Return each figure of every run, with its change against the first run's."""
    known = [dict(measures(run)) for run in runs]
    rows = []
    for name in dict.fromkeys(name for found in known for name in found):
        first = known[0].get(name)
        rows.append((name, *(_cell(found.get(name), first if found is not known[0] else None) for found in known)))
    letter = runs[0].label.partition(":")[0]
    return Table(f"Figures, with the change against {letter}", ("Figure", *(run.label for run in runs)), rows)


def _cell(found: Measure | None, first: Measure | None) -> str:
    if found is None:
        return UNKNOWN
    said = charts.FORMATS[found.form](found.value)
    if first is None or not first.value:
        return said
    return f"{said} ({100 * (found.value / first.value - 1):+,.1f} %)"


def measures(run: Run) -> Iterator[tuple[str, Measure]]:
    """Yield the figures of a run that can be compared, by name."""
    for one in run.stages:
        yield from _of_training(run, one)
        if (quantized := one.figures(QuantizeReport)) is not None:
            yield f"{one.task}: size", Measure(quantized.model_bytes, "bytes")
            yield f"{one.task}: bits a weight", Measure(quantized.bits_per_weight)
            if quantized.quality:
                yield f"{one.task}: perplexity", Measure(quantized.quality.perplexity)
        if (profile := one.figures(ProfileReport)) is not None:
            yield f"{one.task}: peak memory of a step", Measure(profile.peak_memory_bytes, "bytes")
        if (bench := one.figures(BenchmarkReport)) is not None:
            for row in bench.models:
                if row.decode_speed is not None:
                    yield f"{row.model}: tokens written a second", Measure(row.decode_speed.value)
        if one.report is not None:
            yield f"{one.task}: time", Measure(one.report.run.seconds, "seconds")


def _of_training(run: Run, one: LoadedStage) -> Iterator[tuple[str, Measure]]:
    report = one.figures(TrainReport)
    if report is None:
        return
    yield f"{one.task}: held-out perplexity", Measure(report.last_validation_perplexity)
    yield f"{one.task}: parameters", Measure(report.parameters)
    yield f"{one.task}: tokens learned from", Measure(report.tokens)
    if (epochs := epochs_of(run, one)) is not None:
        yield f"{one.task}: epochs", Measure(epochs)
    yield f"{one.task}: tokens learned from a second", Measure(report.run.tokens_per_second)
    yield f"{one.task}: peak memory", Measure(report.run.training_peak_memory_bytes, "bytes")


def _differences(runs: Sequence[Run]) -> list[Block]:
    """Return the settings in which the runs differ, as the locks hold them."""
    notes: list[Block] = [
        Note(f"{run.label}: its settings are not known: {layout.LOCKFILE} {run.lock_problem}.")
        for run in runs
        if run.lock_problem
    ]
    known = [dict(_settings(run)) for run in runs if not run.lock_problem]
    labels = [run.label for run in runs if not run.lock_problem]
    if len(known) < 2:
        return notes
    rows = [
        (name, *(shorten(clean(found.get(name, UNKNOWN)), _LONGEST_VALUE) for found in known))
        for name in dict.fromkeys(name for found in known for name in found)
        if len({found.get(name) for found in known}) > 1
    ]
    if not rows:
        return [Text("All settings of these runs are equal."), *notes]
    head = ("Setting", *labels)
    return [Table("Settings that differ", head, rows, words=tuple(range(len(head)))), *notes]


def _settings(run: Run) -> Iterator[tuple[str, str]]:
    """Yield every setting of every stage of a lock, by its dotted name, and what a training chose by trials."""
    for task, made in run.lock.items():
        if isinstance(made, dict):
            yield from _flat(clean(task), made.get("config", {}))
            yield from ((f"{clean(task)}: {key}", toml_value(made[key])) for key in _MADE_BY if key in made)
    for one in run.stages:
        if (trained := one.figures(TrainReport)) is not None:
            yield f"{clean(one.task)}: recomputed layers", Recomputation.in_use(trained.settings).words


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{clean(str(key))}", inner)
    else:
        yield name, toml_value(value)
