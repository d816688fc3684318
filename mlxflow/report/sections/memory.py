"""The memory section: timeline, peaks, phases, breakdown of the peak, leak verdict, suggestions."""

from collections.abc import Sequence

from mlxflow.report import charts, colors
from mlxflow.report.elements import Block, Figure, Note, Section, Table, Text
from mlxflow.report.formatting import clean, plural, show, show_bytes, show_seconds
from mlxflow.report.load_run import Run
from mlxflow.report.sections import beside, timelines
from mlxflow.report.stage_reports.profile import LeakReport, PeakParts, PhaseFigures, ProfileReport

# MLX's arrays at their peak, then other memory
ARRAYS = ("weights", "gradients", "optimizer", "activations", "update", "logits", "data")
_PARTS = (*ARRAYS, "cache", "other")


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("memory", "Memory", timelines.overlay_timelines(runs) + beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    blocks: list[Block] = []
    for one in run.of_kind("profile"):
        report, timeline, cut_off = one.figures(ProfileReport), run.timelines.get(one.task), run.cut_off.get(one.task)
        if cut_off:
            blocks += timelines.draw_cut_off(one, cut_off)
        if report is None:
            blocks.append(Note(f"No memory profile to show: {one.said}"))
        blocks += _leak(report.leak) if report else []
        blocks += timelines.draw(one, timeline) if report or timeline else []
        if report:
            blocks += _composition(report.composition) + _limits(report) + _phases(report.phases)
            blocks += _peaks(report) + _suggestions(report)
    return blocks or [Note("No memory profile to show: the workflow has no profile stage.")]


def _leak(leak: LeakReport) -> list[Block]:
    if leak.verdict == "none":
        text = "No leak: active memory at the steps' ends does not grow."
    elif leak.verdict == "leak":
        until = leak.steps_until_limit
        text = f"A leak: active memory grows by {show_bytes(leak.bytes_per_step)} a step"
        text += f" and meets the limit in {plural(until, 'step')}." if until is not None else "."
    else:
        text = "Bounded growth: active memory grew, and stopped growing."
    if leak.process.verdict != "none":
        text += f" The process's memory, outside of MLX: {leak.process.verdict}."
    return [Text(text) if leak.verdict == "none" else Note(text)]


def _composition(composition: PeakParts) -> list[Block]:
    known = [(part, size) for part in _PARTS if (size := getattr(composition, f"{part}_bytes"))]
    if not known:
        return [Note("The profile did not report what its peak is made of.")]
    parts = [(part, size, colors.style_of_thing(part)) for part, size in known]
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


def _limits(report: ProfileReport) -> list[Block]:
    memory, cache = show_bytes(report.memory_limit_bytes), show_bytes(report.cache_limit_bytes)
    return [Text(f"MLX's limits: {memory} of arrays, {cache} of freed buffers kept.")]


def _phases(phases: Sequence[PhaseFigures]) -> list[Block]:
    if not phases:
        return [Note("The profile did not report its phases.")]
    bars, cells = [], []
    for phase in phases:
        name = clean(phase.name)
        bars.append(charts.Bar(name, phase.peak_memory_bytes, None, None, "c1"))
        figures = (show_bytes(phase.peak_memory_bytes), show_bytes(phase.growth_bytes))
        cells.append((name, show(phase.calls), show_seconds(phase.seconds), *figures))
    head = ("Phase", "Calls", "Time", "Peak", "Growth")
    label = "Peak memory by phase. " + " ".join(f"{bar.name}: {show_bytes(bar.value)}." for bar in bars)
    drawn = charts.bars(bars, label=label, form="bytes")
    return [Figure("Peak memory by phase", drawn, Table("Every phase", head, cells, folded=True), wide=True)]


def _peaks(report: ProfileReport) -> list[Block]:
    cells = [(show_bytes(peak.bytes), show(peak.step), clean(peak.phase)) for peak in report.peaks]
    return [Table("The highest peaks", ("Memory", "Step", "Phase"), cells, words=(2,))] if cells else []


def _suggestions(report: ProfileReport) -> list[Block]:
    cells = [
        (f"{one.key} = {one.value}", show_bytes(one.saves_bytes), clean(one.evidence))
        for one in report.suggestions or ()
    ]
    return (
        [Table("What would save memory, most first", ("Setting", "Saves", "Why"), cells, words=(0, 2))] if cells else []
    )
