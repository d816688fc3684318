"""The memory timeline: of MLX, the process and the system, over steps and seconds, with phases and peaks."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlxflow.messages.advice import advise_build
from mlxflow.report import colors, line_plot
from mlxflow.report.elements import Block, Figure, Note, Table
from mlxflow.report.formatting import clean, show, show_bytes
from mlxflow.report.line_plot import Axes, Band, Mark, Series
from mlxflow.report.load_run import LoadedStage, Run
from mlxflow.report.stage_reports.profile import ProfileReport
from mlxflow.report.timelines import Span, Timeline

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HINT = "Drag to zoom all timelines of a kind, double-click to go back."

#: Columns drawn over the steps of a profile, in plots of their own scale.
_MLX = (
    ("active_memory_bytes", "active"),
    ("peak_memory_bytes", "peak"),
    ("cache_memory_bytes", "cache"),
)
_PROCESS = (
    ("rss_bytes", "resident"), ("footprint_bytes", "footprint"), ("pss_bytes", "proportional"),
    ("unique_bytes", "unique"),
)  # fmt: skip
_SYSTEM = (("available_bytes", "available"), ("swap_bytes", "swap"), ("device_bytes", "device"))

#: Plots of two runs: title, prefix of the columns, axis, and columns.
_OVERLAID = (
    ("MLX's memory of all runs, at each step's end", "", "step", _MLX[:2]),
    ("MLX's memory of all runs, sampled", "sample_", "seconds", _MLX[:1]),
    ("The process's memory of all runs, sampled", "sample_", "seconds", _PROCESS[:1]),
)

# Adjacent phases of one name that are shorter than this share of the timeline are drawn as one
_NARROW = 1 / 400


class _Axis(NamedTuple):
    """The x axis of readings: prefix of their columns' names, unit, and label."""

    prefix: str
    name: str
    form: str
    group: str
    what: str


def draw(stage: LoadedStage, timeline: Timeline | None, until: str = "") -> list[Block]:
    """Return the plots of a timeline.

    Args:
        stage: the stage.
        timeline: of the stage, or None.
        until: suffix of the titles.
    """
    if timeline is None:
        return [
            Note(f"No memory timeline to show: {stage.task} left no timeline.safetensors. {advise_build(stage.task)}")
        ]
    plots: list[Block] = []
    for prefix, x_name, x_form, what in (
        ("", "step", "number", "at each step's end"),
        ("sample_", "seconds", "seconds", "sampled"),
    ):
        axis = _Axis(prefix, x_name, x_form, f"memory {stage.task} {x_name}{until}", what + until)
        for keys, title in (
            (_MLX, "MLX's memory"),
            (_PROCESS, "The process's memory"),
            (_SYSTEM, "The system's memory"),
        ):
            plots += _plot(timeline, keys, title, axis, [] if until or prefix or keys is not _MLX else _marks(stage))
    if not plots:
        plots.append(Note(f"{stage.task} left a timeline that holds no readings."))
    return [Note(timeline.problem), *plots] if timeline.problem else plots


def draw_cut_off(stage: LoadedStage, timeline: Timeline) -> list[Block]:
    """Return the plots of an unfinished run, and how it ended."""
    again = "" if timeline.ended.startswith("is still") else f" {advise_build(stage.task)}"
    text = f"The last run of {stage.task} {clean(timeline.ended)}; all that it measured until then is shown.{again}"
    return [Note(text), *draw(stage, timeline, " until then")]


def _marks(stage: LoadedStage) -> list[Mark]:
    report = stage.figures(ProfileReport)
    return [
        Mark(peak.step, peak.bytes, f"{show_bytes(peak.bytes)} in {clean(peak.phase)}, step {show(peak.step)}")
        for peak in (report.peaks if report else ())
    ]


def _plot(
    timeline: Timeline, keys: Sequence[tuple[str, str]], title: str, axis: _Axis, marks: list[Mark]
) -> list[Block]:
    columns = timeline.columns
    x = columns.get(axis.prefix + axis.name)
    series = _series(columns, keys, axis.prefix, x)
    if not series:
        return []
    of_mlx = keys is _MLX
    bands: list[Band] = []
    if of_mlx and x is not None and axis.prefix:
        bands = _bands(timeline.phases)
    elif of_mlx and x is not None:
        series += _phase_peaks(timeline)
    phases = _phases_sentence(bands)
    x_name, x_form = (axis.name, axis.form) if x is not None else ("reading", "number")
    plot = line_plot.lines(
        series,
        Axes(x_name, "bytes", x_form, from_zero=of_mlx),
        label=f"{title}, {axis.what}. {_maximum_sentence(series)}{phases}",
        group=axis.group,
        marks=_marks_within(marks, series),
        bands=bands,
        height=280 if bands else 220,
    )
    figures = _ends_table(series)
    legend = _legend(series, bands)
    return [Figure(f"{title}, {axis.what}", plot, figures, legend, wide=of_mlx, hint=_HINT if of_mlx else "")]


def _phases_sentence(bands: Sequence[Band]) -> str:
    named = dict.fromkeys(band.name.partition(",")[0] for band in bands)
    return f" Phases: {', '.join(named)}." if named else ""


def _marks_within(marks: Sequence[Mark], series: Sequence[Series]) -> list[Mark]:
    begin, end = min(float(curve.x[0]) for curve in series), max(float(one.x[-1]) for one in series)
    return [mark for mark in marks if begin <= mark.x <= end]


def _maximum_sentence(series: Sequence[Series]) -> str:
    return " ".join(f"{curve.name}: {show_bytes(float(curve.y.max()))} at most." for curve in series)


def _legend(series: Sequence[Series], bands: Sequence[Band]) -> tuple[tuple[str, str], ...]:
    words = {band.style: _last_part(band.name.partition(",")[0]) for band in bands}
    return (
        *((curve.style, curve.name) for curve in series),
        *((f"{style} box", word) for style, word in words.items()),
    )


def _series(
    columns: "dict[str, NDArray[np.float64]]",
    keys: Sequence[tuple[str, str]],
    prefix: str,
    x: "NDArray[np.float64] | None",
) -> list[Series]:
    series = []
    for key, name in keys:
        y = columns.get(prefix + key)
        if y is None or (key == "device_bytes" and not y.any()):  # a device without memory of its own
            continue
        # A truncated file may lack the steps and still have the samples
        across = np.arange(len(y), dtype=np.float64) if x is None or len(x) < len(y) else x[: len(y)]
        known = np.isfinite(y) & np.isfinite(across)
        if known.any():
            series.append(Series(name, across[known], y[known], colors.style_of_thing(name)))
    return series


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]


def _known(phases: Sequence[Span]) -> list[Span]:
    return [phase for phase in phases if np.isfinite(phase[1:]).all()]


def _phase_peaks(timeline: Timeline) -> list[Series]:
    """Return the peak of each phase within a step, by step."""
    steps, ends = timeline.columns.get("step"), timeline.columns.get("seconds")
    if steps is None or ends is None or len(steps) != len(ends):
        return []
    peaks_by_phase: dict[str, dict[int, float]] = {}
    for phase in _known(timeline.phases):
        place = int(np.searchsorted(ends, phase.end_seconds))
        if "/" in phase.name and place < len(steps):
            peaks = peaks_by_phase.setdefault(clean(phase.name), {})
            peaks[place] = max(peaks.get(place, 0.0), phase.peak_bytes)
    # A phase of only the first step is not part of every step
    repeated = [(name, sorted(peaks.items())) for name, peaks in peaks_by_phase.items() if len(peaks) > 1]
    styles = colors.styles_of_phases([_last_part(name) for name, _ in repeated])
    return [
        Series(
            f"peak in {_last_part(name)}",
            steps[[place for place, _ in peaks]],
            np.array([peak for _, peak in peaks]),
            styles[_last_part(name)],
        )
        for name, peaks in repeated[:3]
    ]


def _bands(phases: Sequence[Span]) -> list[Band]:
    """Return the phases as bands, nested ones in a lower lane; merged until they are few enough for a page."""
    known = sorted(_known(phases), key=lambda phase: (phase.begin_seconds, -phase.end_seconds))
    if not known:
        return []
    narrow = _NARROW * (max(phase.end_seconds for phase in known) - known[0].begin_seconds)
    shown = [*_joined([phase for phase in known if "/" not in phase.name], narrow)]
    wide = [phase for phase, count in shown if count == 1]
    begins = np.array([phase.begin_seconds for phase in wide])
    for phase in (phase for phase in known if phase.name.count("/") == 1):
        place = int(np.searchsorted(begins, phase.begin_seconds, side="right")) - 1
        if place >= 0 and phase.end_seconds <= wide[place].end_seconds and phase.name.startswith(wide[place].name):
            shown.append((phase, 1))
    return _styled(shown)


def _styled(shown: Sequence[tuple[Span, int]]) -> list[Band]:
    """Return phases as bands, each nested phase with its own style in a lane below its parent."""
    parts = colors.styles_of_phases([_last_part(phase.name) for phase, _ in shown if "/" in phase.name])
    wholes = colors.styles_of_phases([_last_part(phase.name) for phase, _ in shown if "/" not in phase.name])
    bands = []
    for phase, count in shown:
        part = _last_part(phase.name)
        style = parts[part] if "/" in phase.name else f"{wholes[part]} b"
        name = clean(phase.name) + (f", {count} times" if count > 1 else "")
        is_whole = phase.name.count("/") == 0
        # If the parts of a phase are drawn, only they have heights
        height = 0.0 if is_whole and count == 1 and _has_parts(phase, shown) else phase.peak_bytes
        bands.append(Band(name, phase.begin_seconds, phase.end_seconds, height, 0 if is_whole else 1, style))
    return bands


def _has_parts(phase: Span, shown: Sequence[tuple[Span, int]]) -> bool:
    return any(other.name.startswith(f"{phase.name}/") for other, _ in shown)


def _joined(phases: Sequence[Span], narrow: float) -> Iterator[tuple[Span, int]]:
    """Yield phases with a count: neighbors of one name that are too narrow to distinguish are merged."""
    held: Span | None = None
    count = 0
    for phase in phases:
        is_narrow = phase.end_seconds - phase.begin_seconds < narrow
        if held and is_narrow and held.name == phase.name and held.end_seconds - held.begin_seconds < 8 * narrow:
            peak = max(held.peak_bytes, phase.peak_bytes)
            held, count = Span(held.name, held.begin_seconds, phase.end_seconds, peak), count + 1
            continue
        if held:
            yield held, count
        held, count = phase, 1
    if held:
        yield held, count


def _ends_table(series: Sequence[Series]) -> Table:
    cells = [
        (curve.name, *(show_bytes(float(value)) for value in (curve.y[0], curve.y.min(), curve.y.max(), curve.y[-1])))
        for curve in series
    ]
    return Table("Each line in figures", ("Line", "First", "Least", "Most", "Last"), cells, folded=True)


def overlay_timelines(runs: Sequence[Run]) -> list[Block]:
    """Return plots that overlay the timelines of several runs, as far as all have them."""
    blocks: list[Block] = []
    if len(runs) < 2:
        return blocks
    for task in (one.task for one in runs[0].of_kind("profile")):
        latest = [run.cut_off.get(task) or run.timelines.get(task) for run in runs]
        both = [timeline for timeline in latest if timeline is not None]
        if len(both) < len(runs):
            continue
        blocks += _overlays(task, [run.label for run in runs], both)
    return blocks


def _overlays(task: str, labels: Sequence[str], timelines: Sequence[Timeline]) -> Iterator[Figure]:
    """Yield each plot with a line of every run."""
    for title, prefix, x_name, keys in _OVERLAID:
        series = [
            one._replace(name=f"{one.name}, {label}", style=colors.style_of(index) + (" b" if nth else ""))
            for index, (label, timeline) in enumerate(zip(labels, timelines, strict=True))
            for nth, one in enumerate(_of_one_run(timeline, keys, prefix, x_name))
        ]
        if len({curve.style.partition(" b")[0] for curve in series}) >= min(len(labels), colors.STYLES):
            group = f"memory {task} {x_name}{' of all' if prefix else ''}"
            yield _overlay(series, title, x_name, group, from_zero=keys is not _OVERLAID[-1][-1])


def _of_one_run(timeline: Timeline, keys: Sequence[tuple[str, str]], prefix: str, x_name: str) -> list[Series]:
    return _series(timeline.columns, keys, prefix, _from_zero(timeline.columns.get(prefix + x_name), prefix))


def _overlay(series: list[Series], title: str, x_name: str, group: str, *, from_zero: bool) -> Figure:
    by_seconds = x_name == "seconds"
    axes = Axes(x_name, "bytes", "seconds" if by_seconds else "number", from_zero=from_zero)
    plot = line_plot.lines(series, axes, label=f"{title}. {_maximum_sentence(series)}", group=group)
    hint = "" if by_seconds else _HINT
    return Figure(title, plot, _ends_table(series), _legend(series, ()), wide=not by_seconds, hint=hint)


def _from_zero(x: "NDArray[np.float64] | None", prefix: str) -> "NDArray[np.float64] | None":
    """Return seconds since the first sample, whose time differs between runs."""
    return x - x[0] if prefix and x is not None and len(x) else x
