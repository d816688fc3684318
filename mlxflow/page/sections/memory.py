"""Memory: the timeline with its peaks, phases, what the peak is made of, the leak verdict, suggestions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlxflow.page import charts
from mlxflow.page.blocks import Block, Figure, Note, Section, Table, Text
from mlxflow.page.charts import Mark, Series
from mlxflow.page.reading import Run, StageRun, Timeline, rows, table
from mlxflow.page.sections import beside
from mlxflow.page.text import clean, number, plural, show, show_bytes, show_seconds

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HINT = "Drag to zoom all timelines of a kind, double-click to go back."

#: Columns drawn over the steps of a profile, in plots of their own scale.
_MLX = (
    ("active_memory_bytes", "active", "c0"),
    ("peak_memory_bytes", "peak", "c1"),
    ("cache_memory_bytes", "cache", "c2"),
)
_PROCESS = (
    ("rss_bytes", "resident", "c0"), ("footprint_bytes", "footprint", "c1"), ("pss_bytes", "proportional", "c2"),
    ("unique_bytes", "unique", "c3"),
)  # fmt: skip
_SYSTEM = (("available_bytes", "available", "c4"), ("swap_bytes", "swap", "c1"))

_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "data", "cache", "other")


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("memory", "Memory", beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for one in run.of_kind("profile"):
        timeline = run.timelines.get(one.task)
        if not one.report and not timeline:
            blocks.append(Note(f"No memory profile to show: {one.said}"))
            continue
        blocks += _leak(one.report) + _timeline(one, timeline) + _composition(one.report)
        blocks += _phases(one.report) + _peaks(one.report) + _suggestions(one.report)
    return blocks or [Note("No memory profile to show: the workflow has no profile stage.")]


def _timeline(one: StageRun, timeline: Timeline | None) -> list[Block]:
    if timeline is None:
        return [Note(f"No memory timeline to show: {one.task} left no timeline.safetensors. Run: doit {one.task}")]
    blocks: list[Block] = [Note(timeline.problem)] if timeline.problem else []
    marks = [
        Mark(step, size, f"{show_bytes(size)} in {clean(str(row.get('phase', 'an unnamed phase')))}, step {show(step)}")
        for row in rows(one.report, "peaks")
        if (step := number(row.get("step"))) is not None and (size := number(row.get("bytes"))) is not None
    ]
    for prefix, x_name, x_form, what in (
        ("", "step", "number", "at each step's end"),
        ("sample_", "seconds", "seconds", "sampled"),
    ):
        axis = _Axis(prefix, x_name, x_form, f"memory {one.task} {x_name}", what)
        for keys, title in (
            (_MLX, "MLX's memory"),
            (_PROCESS, "The process's memory"),
            (_SYSTEM, "The system's memory"),
        ):
            blocks += _plot(timeline.columns, keys, title, axis, marks if keys is _MLX and not prefix else [])
    if len(blocks) == bool(timeline.problem):
        blocks.append(Note(f"{one.task}/timeline.safetensors holds no readings."))
    return blocks


class _Axis(NamedTuple):
    """How readings lie: the beginning of their columns' names, what they are counted by, and in which words."""

    prefix: str
    name: str
    form: str
    group: str
    what: str


def _plot(
    columns: "dict[str, NDArray[Any]]", keys: Sequence[tuple[str, str, str]], title: str, axis: _Axis, marks: list[Mark]
) -> list[Block]:
    x = columns.get(axis.prefix + axis.name)
    series = _series(columns, keys, axis.prefix, x)
    if not series:
        return []
    of_mlx = keys is _MLX
    ends = (min(float(one.x[0]) for one in series), max(float(one.x[-1]) for one in series))
    most = " ".join(f"{one.name}: {show_bytes(float(one.y.max()))} at most." for one in series)
    plot = charts.lines(
        series,
        label=f"{title}, {axis.what}. {most}",
        x_name=axis.name if x is not None else "reading",
        form="bytes",
        x_form=axis.form if x is not None else "number",
        group=axis.group,
        from_zero=of_mlx,
        marks=[mark for mark in marks if ends[0] <= mark.x <= ends[1]],
    )
    legend = tuple((one.style, one.name) for one in series)
    figures = _ends_table(series)
    return [Figure(f"{title}, {axis.what}", plot, figures, legend, wide=of_mlx, hint=_HINT if of_mlx else "")]


def _series(
    columns: "dict[str, NDArray[Any]]", keys: Sequence[tuple[str, str, str]], prefix: str, x: "NDArray[Any] | None"
) -> list[Series]:
    series = []
    for key, name, style in keys:
        y = columns.get(prefix + key)
        if y is None:
            continue
        # A file that was cut off may have lost the steps and still have the readings
        across = np.arange(len(y), dtype=np.float64) if x is None or len(x) < len(y) else x[: len(y)]
        known = np.isfinite(y) & np.isfinite(across)
        if known.any():
            series.append(Series(name, across[known], y[known], style))
    return series


def _ends_table(series: Sequence[Series]) -> Table:
    cells = [
        (one.name, *(show_bytes(float(value)) for value in (one.y[0], one.y.min(), one.y.max(), one.y[-1])))
        for one in series
    ]
    return Table("Each line in figures", ("Line", "First", "Least", "Most", "Last"), cells, folded=True)


def _leak(report: dict[str, Any]) -> list[Block]:
    leak = table(report, "leak")
    verdict = leak.get("verdict")
    if not isinstance(verdict, str):
        return [Note("The profile did not report whether memory leaks.")]
    if verdict == "none":
        said = "No leak: active memory at the steps' ends does not grow."
    elif verdict == "leak":
        until = number(leak.get("steps_until_limit"))
        said = f"A leak: active memory grows by {show_bytes(leak.get('bytes_per_step'))} a step"
        said += f" and meets the limit in {plural(until, 'step')}." if until is not None else "."
    else:
        said = f"{clean(verdict).capitalize()}: {show_bytes(leak.get('bytes_per_step'))} a step, up to a limit."
    process = table(leak, "process").get("verdict")
    if isinstance(process, str) and process != "none":
        said += f" The process's memory, outside of MLX: {clean(process)}."
    return [Text(said) if verdict == "none" else Note(said)]


def _composition(report: dict[str, Any]) -> list[Block]:
    made = table(report, "composition")
    sizes = [(part, number(made.get(f"{part}_bytes"))) for part in _PARTS]
    known = [(part, size) for part, size in sizes if size]
    if not known:
        return [Note("The profile did not report what its peak is made of.")]
    parts = [(part, size, f"c{index % 6}" + (" b" if index > 5 else "")) for index, (part, size) in enumerate(known)]
    label = "What the peak is made of: " + ", ".join(f"{part} {show_bytes(size)}" for part, size in known)
    total = number(made.get("total_bytes")) or sum(size for _, size in known)
    cells = [(part, show_bytes(size), f"{100 * size / total:.1f} %") for part, size in known]
    cells.append(("all of it", show_bytes(total), "100 %"))
    drawn = charts.stacked(parts, label=label, form="bytes")
    legend = tuple((f"{style} box", f"{part} {show_bytes(size)}") for part, size, style in parts)
    figures = Table("What the peak is made of", ("Part", "Size", "Share"), cells, folded=True)
    return [Figure(f"What the peak of {show_bytes(total)} is made of", drawn, figures, legend, wide=True)]


def _phases(report: dict[str, Any]) -> list[Block]:
    found = rows(report, "phases")
    if not found:
        return [Note("The profile did not report its phases.")]
    bars, cells = [], []
    for row in found:
        name = clean(str(row.get("name", "unnamed")))
        if (peak := number(row.get("peak_memory_bytes"))) is not None:
            bars.append(charts.Bar(name, max(0.0, peak), None, None, "c1"))
        figures = (show_bytes(row.get("peak_memory_bytes")), show_bytes(row.get("growth_bytes")))
        cells.append((name, show(row.get("calls")), show_seconds(row.get("seconds")), *figures))
    head = ("Phase", "Calls", "Time", "Peak", "Growth")
    label = "Peak memory by phase. " + " ".join(f"{bar.name}: {show_bytes(bar.value)}." for bar in bars)
    drawn = charts.bars(bars, label=label, form="bytes")
    return [Figure("Peak memory by phase", drawn, Table("Every phase", head, cells, folded=True), wide=True)]


def _peaks(report: dict[str, Any]) -> list[Block]:
    cells = [
        (show_bytes(row.get("bytes")), show(row.get("step")), clean(str(row.get("phase", ""))))
        for row in rows(report, "peaks")
    ]
    return [Table("The highest peaks", ("Memory", "Step", "Phase"), cells, words=(2,))] if cells else []


def _suggestions(report: dict[str, Any]) -> list[Block]:
    cells = [
        (
            f"{row.get('key')} = {row.get('value')}",
            show_bytes(row.get("saves_bytes")),
            clean(str(row.get("evidence", ""))),
        )
        for row in rows(report, "suggestions")
    ]
    return (
        [Table("What would save memory, most first", ("Setting", "Saves", "Why"), cells, words=(0, 2))] if cells else []
    )
