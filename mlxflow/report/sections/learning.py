"""The learning section: curves of loss, speed, learning rate and memory over the steps."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mlxflow.report import colors, line_plot
from mlxflow.report.elements import Block, Figure, Note, Section, Table
from mlxflow.report.formatting import show, show_percent
from mlxflow.report.line_plot import Axes, Band, Series
from mlxflow.report.load_run import Run, column
from mlxflow.report.rank_waits import WaitSpan, wait_spans

_HINT = "Move over a plot for values; drag to zoom all of them, double-click to go back. Keys: arrows, +, -, 0."

#: Smaller plots: key of a line of metrics.jsonl, title, form.
_FURTHER = (
    ("tokens_per_second", "Tokens learned from per second", "number"),
    ("learning_rate", "Learning rate", "number"),
    ("gradient_norm", "Gradient norm", "number"),
    ("batch_size", "Rows in a forward pass", "number"),
    ("peak_memory_bytes", "Peak memory", "bytes"),
)
_FURTHER_STYLE = "c2"
_ROWS = 24

# The most ranks with a line of their own
_MOST_RANKS = 8


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    blocks: list[Block] = []
    for task in dict.fromkeys(stage.task for run in runs for stage in run.stages if stage.task in run.curves):
        blocks += _of_task(task, runs, several=len({task for run in runs for task in run.curves}) > 1)
    for run in runs:
        blocks += [Note(curve.problem) for curve in run.curves.values() if curve.problem]
        if not any(curve.records for curve in run.curves.values()):
            reason = next((one.said for one in run.of_kind("train") if one.said), "no metrics.jsonl was found.")
            blocks.append(Note(f"No learning curve to show{_of(run)}: {reason}"))
    return Section("learning", "Learning", blocks)


def _of(run: Run) -> str:
    return f" of {run.label}" if run.label else ""


def _of_task(task: str, runs: Sequence[Run], *, several: bool) -> list[Block]:
    title = f" of {task}" if several else ""
    losses = [
        _series(run, task, kind, "loss", name, _loss_style(name, index, len(runs)))
        for index, run in enumerate(runs)
        for kind, name in (("train", "training"), ("validation", "held-out"))
    ]
    known = [loss for loss in losses if len(loss.x)]
    if not known:
        return []
    label = f"Loss{title} over steps. {' '.join(f'{one.name}: {_ends(one)}.' for one in known)}"
    plot = line_plot.lines(known, Axes("step"), label=label, group=f"steps {task}", height=280)
    blocks: list[Block] = [
        Figure(
            f"Loss{title}, in nats a token",
            plot,
            _loss_table(known),
            _legend(known),
            wide=True,
            hint=_HINT,
            switches=True,
        )
    ]
    for run in runs:
        blocks += _ranks(task, run, title)
    for key, name, form in _FURTHER:
        blocks += _further(task, runs, title, key, name, form)
    return blocks


def _ranks(task: str, run: Run, title: str) -> list[Block]:
    """Return the waiting of each rank over the steps, with the slowest rank above; nothing for a single process."""
    spans = wait_spans(run.curves[task].records if task in run.curves else ())
    count = min((len(span.shares) for span in spans), default=0)
    if len(spans) < 2 or count < 2:
        return []
    steps = np.array([span.end for span in spans])
    shown = range(count) if count <= _MOST_RANKS else sorted({*range(_MOST_RANKS - 1), count - 1})
    series = [
        Series(f"rank {rank}", steps, np.array([span.shares[rank] for span in spans]), colors.style_of(rank))
        for rank in shown
    ]
    bands = [
        Band(f"slowest: rank {slowest}", begin, end, 0.0, 0, colors.style_of(slowest))
        for slowest, begin, end in _slowest(spans)
    ]
    means = [float(np.mean([span.shares[rank] for span in spans])) for rank in range(count)]
    waits = ", ".join(f"rank {rank}: {show_percent(means[rank])}" for rank in shown)
    label = f"Share of the time that each rank waited for the others{title}, over steps. {waits}."
    axes = Axes("step", "percent", from_zero=True)
    plot = line_plot.lines(series, axes, label=label, bands=bands, group=f"steps {task}", height=170)
    hint = "The bar above the lines has the color of the slowest rank: the one that waited the least."
    name = f"Share of the time that each rank waited for the others{title}{_of(run)}"
    return [Figure(name, plot, _rank_table(spans, means, shown), _legend(series), wide=True, hint=hint)]


def _slowest(spans: Sequence[WaitSpan]) -> list[tuple[int, float, float]]:
    """Return the slowest rank with the steps from which and to which it is that."""
    found: list[tuple[int, float, float]] = []
    for span in spans:
        if found and found[-1][0] == span.slowest and found[-1][2] == span.begin:
            found[-1] = (span.slowest, found[-1][1], span.end)
        else:
            found.append((span.slowest, span.begin, span.end))
    return found


def _rank_table(spans: Sequence[WaitSpan], means: Sequence[float], shown: Iterable[int]) -> Table:
    steps = sum(span.end - span.begin for span in spans)
    slow = [sum(span.end - span.begin for span in spans if span.slowest == rank) for rank in range(len(means))]
    rows = [(str(rank), show_percent(means[rank]), show_percent(slow[rank] / steps)) for rank in shown]
    return Table("Waiting of each rank", ("Rank", "Waited", "Steps as the slowest"), rows, folded=True)


def _further(task: str, runs: Sequence[Run], title: str, key: str, name: str, form: str) -> list[Block]:
    """Return the smaller plot of one column of the metrics, if it has values."""
    style = colors.style_of_thing("peak") if key == "peak_memory_bytes" else _FURTHER_STYLE
    columns = [
        _series(run, task, "train", key, name, style if len(runs) == 1 else colors.style_of(index))
        for index, run in enumerate(runs)
    ]
    drawn = [one for one in columns if len(one.x) > 1 and (key != "batch_size" or one.y.min() < one.y.max())]
    if not drawn:
        return []
    if key == "tokens_per_second" and any(wait_spans(run.curves[task].records) for run in runs if task in run.curves):
        name = f"{name}, by all ranks"
    label = f"{name}{title} over steps. {' '.join(f'{one.name}: {_ends(one)}.' for one in drawn)}"
    zero = key in ("tokens_per_second", "peak_memory_bytes", "batch_size")
    plot = line_plot.lines(drawn, Axes("step", form, from_zero=zero), label=label, group=f"steps {task}", height=150)
    return [Figure(f"{name}{title}", plot, legend=_legend(drawn) if len(runs) > 1 else ())]


def _loss_style(name: str, index: int, num_runs: int) -> str:
    """Return the style of a loss: a color for each kind, or of several runs a color for each run."""
    if num_runs == 1:
        return colors.style_of_thing(name)
    return colors.style_of(index) + (" b" if name == "training" else "")


def _series(run: Run, task: str, kind: str, key: str, name: str, style: str) -> Series:
    curve = run.curves.get(task)
    records: Iterable[dict[str, Any]] = curve.records if curve else ()
    x, y = column([record for record in records if record.get("kind") == kind], "step", key)
    shown = f"{name}, {run.label}" if run.label else name
    return Series(shown, np.array(x), np.array(y), style)


def _ends(series: Series) -> str:
    return f"from {show(float(series.y[0]))} to {show(float(series.y[-1]))}"


def _legend(series: Sequence[Series]) -> tuple[tuple[str, str], ...]:
    return tuple((curve.style, curve.name) for curve in series)


def _loss_table(series: Sequence[Series]) -> Table:
    """Return a table of the curves at a few evenly spaced steps."""
    steps = sorted({float(step) for one in series for step in one.x.tolist()})
    chosen = steps if len(steps) <= _ROWS else [steps[round(i * (len(steps) - 1) / (_ROWS - 1))] for i in range(_ROWS)]
    known = [dict(zip(curve.x.tolist(), curve.y.tolist(), strict=True)) for curve in series]
    rows = [(show(step), *(show(values.get(step), 4) for values in known)) for step in dict.fromkeys(chosen)]
    return Table("Loss by step", ("Step", *(one.name for one in series)), rows, folded=True)
