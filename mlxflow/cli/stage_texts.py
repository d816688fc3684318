"""The reports of train, export, evaluate, profile, benchmark and report stages as text for a terminal."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxflow.benchmarking.report_comparison import markdown_of_report
from mlxflow.messages.markdown_tables import table_of
from mlxflow.report.formatting import show, show_bytes, show_seconds
from mlxflow.report.load_run import read_curve
from mlxflow.report.stage_reports.benchmark import BenchmarkReport
from mlxflow.report.stage_reports.evaluate import EvaluateReport
from mlxflow.report.stage_reports.export import ExportReport
from mlxflow.report.stage_reports.profile import ProfileReport
from mlxflow.report.stage_reports.report import PageReport
from mlxflow.report.stage_reports.train import TrainReport
from mlxflow.storage import layout
from mlxflow.storage.report_structs import StageReport
from mlxflow.training.figures import TrainingRun

# The most points of a learning curve; a longer one is thinned
_MOST_POINTS = 20

#: The form of each report that `text_of` prints, by stage.
FORMS: dict[str, type[StageReport]] = {
    "train": TrainReport,
    "export": ExportReport,
    "evaluate": EvaluateReport,
    "profile": ProfileReport,
    "benchmark": BenchmarkReport,
    "report": PageReport,
}


def text_of(report: StageReport, folder: Path, task: str) -> str:
    """Return the figures of a stage as Markdown: tables first, a summary last.

    Args:
        report: one of `FORMS`.
        folder: the artifact.
        task: the stage.
    """
    match report:
        case TrainReport():
            return "\n".join(_training(report, folder, task)) + "\n"
        case ExportReport():
            return "\n".join(_export(report, folder, task)) + "\n"
        case EvaluateReport():
            return "\n".join(_evaluation(report, task)) + "\n"
        case ProfileReport():
            return "\n".join(_profile(report, task)) + "\n"
        case BenchmarkReport():
            ranks = f"\n{report.ranks.words}\n" if report.ranks else ""
            return markdown_of_report(report) + ranks
        case PageReport():
            return "\n".join(_page(report, folder, task)) + "\n"
    raise TypeError(report)


def _training(report: TrainReport, folder: Path, task: str) -> Iterator[str]:
    curve = read_curve(folder / layout.METRICS)
    yield _curve(curve.records)
    if curve.problem:
        yield curve.problem
    yield from report.warnings
    epochs = "" if report.epochs is None else f" ({show(report.epochs)} epoch{'' if report.epochs == 1 else 's'})"
    yield (
        f"{task}: {report.parameters:,} parameters, {report.steps:,} steps{epochs}, {report.tokens:,} tokens, "
        f"{show(report.run.tokens_per_second)} tokens/s, {_peak_of(report.run)}"
    )
    if waits := report.run.rank_waited_seconds:
        shown = ", ".join(f"rank {rank} {show_seconds(seconds)}" for rank, seconds in enumerate(waits))
        yield f"{len(waits)} ranks, which waited for each other, validations and checkpoints included: {shown}"
    yield (
        f"held-out perplexity {report.first_validation_perplexity:.4g} -> {report.last_validation_perplexity:.4g} "
        f"(+- {report.last_validation_perplexity_standard_error:.2g}), best {report.best_validation_perplexity:.4g} "
        f"at step {report.best_validation_step:,}"
    )


def _curve(records: Sequence[dict[str, Any]]) -> str:
    """Return the learning curve as a table: a row for each step with a loss of training or validation."""
    steps: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.get("kind") in ("train", "validation") and isinstance(record.get("step"), int):
            steps.setdefault(record["step"], {})[record["kind"]] = record
    numbers = sorted(steps)
    stride = max(1, -(-len(numbers) // _MOST_POINTS))
    kept = [*numbers[::stride], *(numbers[-1:] if (len(numbers) - 1) % stride else [])]
    rows = []
    for step in kept:
        train, validation = (steps[step].get(kind, {}) for kind in ("train", "validation"))
        figures = (train.get("loss"), validation.get("loss"), validation.get("perplexity"), train.get("learning_rate"))
        rows.append([f"{step:,}", *("-" if one is None else f"{one:.4g}" for one in figures)])
    return table_of(("step", "loss", "held-out loss", "held-out perplexity", "learning rate"), rows)


def _export(report: ExportReport, folder: Path, task: str) -> Iterator[str]:
    rows = [
        (
            one.name,
            " x ".join(map(str, one.shape)),
            one.type,
            "as they are" if one.keeps_codes else "encoded again" if one.name in report.requantized else "-",
            f"{one.relative_error:.3g}",
        )
        for one in report.tensors
    ]
    if rows:
        yield table_of(("tensor", "shape", "type", "codes", "error"), rows)
    files = ", ".join((folder / name).as_posix() for name in report.files)
    yield f"{task}: {files}: {show_bytes(report.bytes)}, {report.bits_per_weight:.2f} bits a weight"
    if report.requantized:
        yield (
            f"{len(report.requantized)} quantized tensors were encoded again, which adds an error of at most "
            f"{report.largest_relative_error:.3g} of a tensor's norm"
        )


def _evaluation(report: EvaluateReport, task: str) -> Iterator[str]:
    rows = [
        (
            one.task,
            one.model,
            one.kind,
            f"{one.accuracy:.4g} +- {one.standard_error:.2g}",
            f"{one.items:,}",
            f"{one.truncated:,}",
            ", ".join(f"{name} {value:.4g}" for name, value in one.metrics.items()),
        )
        for one in report.accuracies
    ]
    yield table_of(("task", "model", "kind", "accuracy", "items", "truncated prompts", "other figures"), rows)
    interval = f"{report.confidence:.0%} interval"
    compared = [
        (
            one.task,
            f"{one.model} - {one.reference}",
            f"{one.difference:+.4g}",
            f"{one.low:+.4g} to {one.high:+.4g}",
            f"{one.better:,}",
            f"{one.worse:,}",
            one.verdict,
        )
        for one in report.differences
    ]
    if compared:
        yield table_of(("task", "models", "difference", interval, "better items", "worse", "verdict"), compared)
    yield f"{task}: {len(rows)} results, {report.run.known} of them known from an earlier run"
    yield from report.warnings


def _peak_of(run: TrainingRun) -> str:
    peak, limit = run.training_peak_memory_bytes, run.training_memory_limit_bytes
    if limit is None:
        return f"peak {show_bytes(peak)}"
    excess = "" if peak <= limit else ", which was exceeded"
    return f"peak {show_bytes(peak)} with a memory limit of {show_bytes(limit)}{excess}"


def _profile(report: ProfileReport, task: str) -> Iterator[str]:
    phases = (
        (one.name, f"{one.calls:,}", f"{one.seconds:.3g}", show_bytes(one.peak_memory_bytes), f"{one.growth_bytes:+,}")
        for one in report.phases
    )
    yield table_of(("phase", "calls", "seconds", "peak", "growth in bytes"), phases)
    parts = report.composition
    names = (name for name in parts.__struct_fields__ if name != "total_bytes")
    sized = sorted(((getattr(parts, name), name.removesuffix("_bytes")) for name in names), reverse=True)
    titles = ("part of the peak of the process", "size")
    yield table_of(titles, [(name, show_bytes(size)) for size, name in sized if size])
    for one in report.suggestions or ():
        yield f"{one.key} = {_toml(one.value)} saves {show_bytes(one.saves_bytes)}: {one.evidence}"
    yield (
        f"{task}: peak memory {show_bytes(report.peak_memory_bytes)} of {show_bytes(report.memory_limit_bytes)}, "
        f"{report.batch_size} rows, {show_seconds(report.median_step_seconds)} a step; leak: {report.leak.verdict}"
    )


def _page(report: PageReport, folder: Path, task: str) -> Iterator[str]:
    for sample in report.samples:
        yield f"{sample.model}: {_quoted([sample.question, sample.prompt])}"
        yield f"    {_quoted([sample.text])}" if sample.error is None else f"    {sample.error}"
    yield f"{task}: {(folder / layout.PAGE).as_posix()}, {show_bytes(report.page_bytes)}, {len(report.samples)} samples"


def _quoted(texts: Iterable[str | None]) -> str:
    return next((repr(text) for text in texts if text is not None), "''")


def _toml(value: bool | int | float | str) -> str:
    from mlxflow.storage.toml_tables import toml_value

    return toml_value(value)
