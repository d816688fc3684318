"""Memory: the timeline with its peaks, phases, what the peak is made of, the leak verdict, suggestions."""

from collections.abc import Sequence
from typing import Any

from mlxflow.report import charts
from mlxflow.report.elements import Block, Figure, Note, Section, Table, Text
from mlxflow.report.formatting import clean, number, plural, show, show_bytes, show_seconds
from mlxflow.report.load_run import Run, rows, table
from mlxflow.report.sections import beside, timelines

# MLX's arrays at their peak, then what lies beside them
ARRAYS = ("weights", "gradients", "optimizer", "activations", "update", "logits", "data")
_PARTS = (*ARRAYS, "cache", "other")


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("memory", "Memory", timelines.over_each_other(runs) + beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for one in run.of_kind("profile"):
        timeline, cut_off = run.timelines.get(one.task), run.cut_off.get(one.task)
        if cut_off:
            blocks += timelines.draw_cut_off(one, cut_off)
        if not one.report and not timeline:
            blocks.append(Note(f"No memory profile to show: {one.said}"))
            continue
        blocks += _leak(one.report) + timelines.draw(one, timeline) + _composition(one.report)
        blocks += _limits(one.report) + _phases(one.report) + _peaks(one.report) + _suggestions(one.report)
    return blocks or [Note("No memory profile to show: the workflow has no profile stage.")]


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
    parts = [(part, size, charts.style_of(index)) for index, (part, size) in enumerate(known)]
    label = "What the peak is made of: " + ", ".join(f"{part} {show_bytes(size)}" for part, size in known)
    total = sum(size for _, size in known)
    arrays = sum(size for part, size in known if part in ARRAYS)
    title = f"What the {show_bytes(total)} at the peak are made of"
    title += (
        f": {show_bytes(arrays)} of MLX's arrays, {show_bytes(total - arrays)} beside them" if total > arrays else ""
    )
    cells = [(part, show_bytes(size), f"{100 * size / total:.1f} %") for part, size in known]
    cells.append(("all of it", show_bytes(total), "100 %"))
    drawn = charts.stacked(parts, label=label, form="bytes")
    legend = tuple((f"{style} box", f"{part} {show_bytes(size)}") for part, size, style in parts)
    figures = Table("What the peak is made of", ("Part", "Size", "Share"), cells, folded=True)
    return [Figure(title, drawn, figures, legend, wide=True)]


def _limits(report: dict[str, Any]) -> list[Block]:
    memory, cache = (number(report.get(f"{kind}_limit_bytes")) for kind in ("memory", "cache"))
    if memory is None or cache is None:
        return []
    return [Text(f"MLX's limits: {show_bytes(memory)} of arrays, {show_bytes(cache)} of freed buffers kept.")]


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
