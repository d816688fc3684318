"""The benchmark section: training speed with intervals, models, convergence, bottleneck, targets."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlxflow.report import charts, colors, line_plot
from mlxflow.report.charts import Bar
from mlxflow.report.elements import Block, Figure, Note, Section, Table, Text
from mlxflow.report.formatting import UNKNOWN, clean, show, show_bytes, show_interval, show_percent, show_seconds
from mlxflow.report.line_plot import Axes, Series
from mlxflow.report.load_run import Run
from mlxflow.report.sections import beside
from mlxflow.report.stage_reports.benchmark import (
    BenchmarkReport,
    BottleneckFigures,
    ConvergenceCurve,
    DriftFigures,
    RankFigures,
)
from mlxflow.report.stage_reports.benchmark_rows import ModelRow, TrainingRow


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("benchmark", "Benchmark", _pairs(runs) + beside(runs, _blocks))


def _pairs(runs: Sequence[Run]) -> list[Block]:
    """Return the figures that the first run and others have, as bars on one scale."""
    if len(runs) < 2:
        return []
    figures: tuple[tuple[Callable[[Run], dict[str, _Known]], str, str, bool], ...] = (
        (_training_speeds, "Training: tokens learned from per second, all runs", "number", True),
        (_decode_speeds, "Decode, tokens per second, all runs", "number", False),
        (_sizes, "Size of the model, all runs", "bytes", False),
    )
    drawn = (
        _beside(runs, [of_run(run) for run in runs], title, form, wide=wide) for of_run, title, form, wide in figures
    )
    return [figure for figure in drawn if figure]


def _beside(
    runs: Sequence[Run], known: Sequence["dict[str, _Known]"], title: str, form: str, *, wide: bool
) -> Figure | None:
    """Return bars of the figures that the first run and at least one other have; None if there are none."""
    bars, cells = [], []
    for name, first in known[0].items():
        found = [figures.get(name) for figures in known]
        if sum(figure is not None for figure in found) < 2:
            continue
        bars += [
            Bar(f"{name}, {_letter(run)}", *figure, colors.style_of(index))
            for index, (run, figure) in enumerate(zip(runs, found, strict=True))
            if figure
        ]
        words = [charts.FORMATS[form](figure[0]) if figure else UNKNOWN for figure in found]
        cells.append((name, *words, *(_ratio(first, figure) if figure else UNKNOWN for figure in found[1:])))
    if not bars:
        return None
    label = f"{title}. " + " ".join(f"{bar.name}: {charts.FORMATS[form](bar.value)}." for bar in bars)
    legend = tuple((f"{colors.style_of(index)} box", run.label) for index, run in enumerate(runs))
    table = _ratios(runs, cells, f"{title}, in figures")
    return Figure(title, charts.bars(bars, label=label, form=form), table, legend, wide=wide)


def _ratios(runs: Sequence[Run], cells: Sequence[tuple[str, ...]], caption: str) -> Table:
    """Return the figures of all runs as a table, with columns for the ratios to the first run."""
    against = (f"{_letter(run)} against {_letter(runs[0])}" for run in runs[1:])
    head = ("Setting", *(run.label for run in runs), *against)
    return Table(caption, head, cells, folded=True, words=(0, *range(1 + len(runs), 2 * len(runs))))


_Known = tuple[float, float | None, float | None]


def _reports(run: Run) -> list[BenchmarkReport]:
    return [report for stage in run.stages if (report := stage.figures(BenchmarkReport)) is not None]


def _training_speeds(run: Run) -> dict[str, _Known]:
    """Return tokens per second with their interval by row name; the first of equal names."""
    rows = [row for report in _reports(run) for row in report.training]
    return {row_name(row): row.speed for row in reversed(rows) if row.speed is not None}


def _decode_speeds(run: Run) -> dict[str, _Known]:
    rows = [row for report in _reports(run) for row in report.models]
    return {clean(row.model): row.decode_speed for row in reversed(rows) if row.decode_speed is not None}


def _sizes(run: Run) -> dict[str, _Known]:
    rows = [row for report in _reports(run) for row in report.models]
    return {clean(row.model): (row.model_bytes, None, None) for row in reversed(rows) if row.model_bytes is not None}


def _letter(run: Run) -> str:
    return run.label.partition(":")[0]


def _ratio(first: _Known, second: _Known) -> str:
    """Return the ratio of the second to the first, in words."""
    text = f"{show(second[0] / first[0])} times"
    (low, high), (other_low, other_high) = first[1:], second[1:]
    if not low or not high or other_low is None or other_high is None:
        return text
    least, most = other_low / high, other_high / low
    return f"{text} ({show(least)} to {show(most)})" + (", inside the noise" if least <= 1 <= most else "")


def _blocks(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for one in run.of_kind("benchmark"):
        report = one.figures(BenchmarkReport)
        if report is None:
            blocks.append(Note(f"No benchmark to show: {one.said}"))
            continue
        blocks += _training(report.training) + _drift(report.drift) + _ranks(report.ranks)
        blocks += _models(report.models, colors.styles_of_models([*run.models]))
        blocks += _convergence(report.convergence or ()) + _bottleneck(report.bottleneck) + _promises(report)
    return blocks or [Note("No benchmark to show: the workflow has no benchmark stage.")]


def _ranks(figures: RankFigures | None) -> list[Block]:
    """Return the speed on one process and on all ranks; nothing where one process trains."""
    if figures is None:
        return []
    waited = ", ".join(show_seconds(seconds) for seconds in figures.waited_seconds)
    rows = [
        ("1 process", show(figures.alone_tokens_per_second), UNKNOWN, UNKNOWN),
        (
            f"{figures.ranks} ranks ({clean(figures.backend)})",
            show(figures.tokens_per_second),
            show_percent(figures.efficiency),
            waited or UNKNOWN,
        ),
    ]
    head = ("Processes", "Tokens learned from per second", "Efficiency", "Waiting of each rank")
    return [Table("Training on several ranks", head, rows)]


def row_name(row: TrainingRow) -> str:
    """Return the name of a row of training figures."""
    return f"{clean(row.name)}, {show(row.batch_size)} rows"


def _training(rows: Sequence[TrainingRow]) -> list[Block]:
    bars, cells = [], []
    for row in rows:
        name, speed = row_name(row), row.speed
        if speed is not None:
            bars.append(Bar(name, *speed, colors.style_of_thing(row.name)))
        cells.append(
            (
                name,
                show(row.processed_tokens_per_second),
                show(row.tokens_per_second),
                f"{show(speed.low)} \N{EN DASH} {show(speed.high)}" if speed else UNKNOWN,
                show_seconds(row.median_step_seconds),
                show_bytes(row.peak_memory_bytes),
                show(row.tokens_per_second_per_gb),
                show_percent(row.data_wait_share),
                show_seconds(row.compile_seconds),
            )
        )
    failures = [Note(f"{row_name(row)}: {row.error}") for row in rows if row.error is not None]
    if not bars:
        return [*failures] or [Note("The benchmark reported no speed of training.")]
    label = "Tokens learned from per second while training. " + " ".join(
        f"{bar.name}: {show(bar.value)}." for bar in bars
    )
    head = (
        "Setting",
        "Tokens processed/s",
        "Learned from/s",
        "Interval",
        "Step",
        "Peak memory",
        "Tokens/s a GB",
        "Data wait",
        "Compiling",
    )
    figures = Table("Training in figures", head, cells, folded=True)
    caption = "Training: tokens learned from, per second, with intervals"
    return [Figure(caption, charts.bars(bars, label=label), figures, wide=True), *failures]


def _models(rows: Sequence[ModelRow], styles: Mapping[str, str]) -> list[Block]:
    if not rows:
        return [Note("The benchmark reported no models.")]
    cells = [
        (
            clean(row.model),
            show_bytes(row.model_bytes),
            show(row.compression_ratio_fp32),
            show(row.compression_ratio),
            show_interval(row.perplexity, row.perplexity_standard_error),
            "; ".join(f"{show(one.tokens_per_second)} at {show(one.prompt_tokens)}" for one in row.prefill) or UNKNOWN,
            show(row.decode_tokens_per_second),
            show_bytes(row.peak_memory_bytes),
        )
        for row in rows
    ]
    head = (
        "Model",
        "Size",
        "Times smaller than fp32",
        "Than the dense model",
        "Perplexity",
        "Prefill, tokens/s at tokens",
        "Decode, tokens/s",
        "Peak memory",
    )
    sizes = [
        Bar(clean(row.model), row.model_bytes, None, None, styles.get(row.model, "c7"))
        for row in rows
        if row.model_bytes is not None
    ]
    speeds = [
        Bar(clean(row.model), *row.decode_speed, styles.get(row.model, "c7"))
        for row in rows
        if row.decode_speed is not None
    ]
    blocks: list[Block] = [Table("Models", head, cells, words=(0, 5))]
    for title, bars, form in (
        ("Size of the model", sizes, "bytes"),
        ("Decode, tokens per second", speeds, "number"),
    ):
        if bars:
            label = f"{title}. " + " ".join(f"{bar.name}: {charts.FORMATS[form](bar.value)}." for bar in bars)
            blocks.append(Figure(title, charts.bars(bars, label=label, form=form)))
    return blocks + [Note(f"{clean(row.model)}: {row.error}") for row in rows if row.error is not None]


def _convergence(curves: Sequence[ConvergenceCurve]) -> list[Block]:
    blocks: list[Block] = []
    for columns, title, form in (
        ([curve.tokens for curve in curves], "Loss over tokens", "number"),
        ([curve.seconds for curve in curves], "Loss over seconds", "seconds"),
    ):
        if series := _loss_curves(curves, columns):
            label = f"{title}. " + " ".join(f"{s.name}: {show(float(s.y[-1]))} at the end." for s in series)
            key = title.rpartition(" ")[2]
            plot = line_plot.lines(series, Axes(key, x_form=form), label=label, height=180)
            cells = [(s.name, show(float(s.x[-1])), show(float(s.y[-1]), 4)) for s in series]
            figures = Table("Where each ends", ("Run", key.capitalize(), "Loss"), cells, folded=True)
            blocks.append(Figure(title, plot, figures, tuple((s.style, s.name) for s in series)))
    return blocks + _to_the_same_loss(curves) if blocks else [Note("The benchmark reported no convergence.")]


def _loss_curves(curves: Sequence[ConvergenceCurve], columns: Sequence[Sequence[float]]) -> list[Series]:
    """Return the loss of each run over a column of its curve."""
    series = []
    for curve, column in zip(curves, columns, strict=True):
        if points := sorted(zip(column, curve.loss, strict=False)):
            across, up = np.array([x for x, _ in points]), np.array([y for _, y in points])
            series.append(Series(clean(curve.name), across, up, colors.style_of_thing(curve.name)))
    return series


def _to_the_same_loss(curves: Sequence[ConvergenceCurve]) -> list[Block]:
    """Return a sentence with the tokens and seconds that each run took to a loss that all of them reached."""
    took = [
        f"{clean(curve.name)} {show(curve.tokens_to_loss)} tokens and {show_seconds(curve.seconds_to_loss)}"
        for curve in curves
    ]
    return [Text(f"To a loss of {show(curves[0].same_loss)} it took {'; '.join(took)}.")]


def _bottleneck(figures: BottleneckFigures) -> list[Block]:
    shares = (
        ("waiting for data", figures.data_share),
        ("building the graph", figures.graph_share),
        ("computing", figures.compute_share),
        ("synchronizing", figures.synchronize_share),
    )
    known = [(name, share, colors.style_of_thing(name)) for name, share in shares if share is not None]
    if not known:
        return [Note("The benchmark did not report where a step's time goes.")]
    label = "Where a step's time goes: " + ", ".join(f"{name} {show_percent(share)}" for name, share, _ in known)
    legend = tuple((f"{style} box", f"{name} {show_percent(share)}") for name, share, style in known)
    blocks: list[Block] = [
        Figure("Where a step's time goes", charts.stacked(known, label=label), legend=legend, wide=True)
    ]
    for rate, most, what, unit in (
        (figures.flops_per_second, figures.ceiling_flops_per_second, "Training computes", "FLOP/s"),
        (figures.decode_bytes_per_second, figures.ceiling_bytes_per_second, "Decoding reads", "B/s"),
    ):
        if rate is not None and most:
            rates = f"{show(rate / 1e9)} of {show(most / 1e9)} G{unit}"
            text = f"{what}: {rates}, {show_percent(rate / most)} of what this device was measured to do."
            blocks.append(Text(text))
    if figures.advice:
        blocks.append(Text(f"Most worth changing: {figures.advice}"))
    return blocks


def _drift(drift: DriftFigures | None) -> list[Block]:
    if drift is None:
        return []
    text = f"The first setting, timed again at the end, took {show(drift.ratio)} times as long a step."
    return [Note(f"{text} The device slowed down meanwhile.") if drift.is_noticed else Text(text)]


def _promises(report: BenchmarkReport) -> list[Block]:
    cells = [
        (promise.promise, clean(promise.figure or "not measured"), "yes" if promise.holds else "no")
        for promise in report.promises.values()
    ]
    return [Table("Promises", ("Promise", "Measured here", "Held"), cells, words=(0, 1, 2))] if cells else []
