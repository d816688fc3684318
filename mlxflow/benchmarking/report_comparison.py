"""Compare two benchmark reports, and distinguish changes from noise.

A speed has two kinds of noise. Noise within a run is in its interval. Noise between runs shows in the fixed work that
is timed in every round (`machine_speed`): if it became slower, the machine did. Speeds are therefore compared relative
to the fixed work, and the interval is widened by a share of the machine's change, because other work may be affected
more or less by the same cause.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import NamedTuple, Protocol

from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.report.stage_reports.benchmark_rows import Bounded, ModelRow, TrainingRow

# The relative noise of peaks, which depend a little on how far the host runs ahead
_PEAK_BAND = 0.05

# The share of a change of the machine's speed by which intervals are widened
_DOUBT = 0.2


class HasRows(Protocol):
    """The rows of a benchmark: of a whole report, or of repeated measurements."""

    @property
    def training(self) -> Sequence[TrainingRow]:
        """Timed recipes of training, by batch size."""

    @property
    def models(self) -> Sequence[ModelRow]:
        """Models."""


class RepeatedRows(NamedTuple):
    """The rows of repeated measurements: all figures of training, only the speeds of models."""

    training: tuple[TrainingRow, ...]
    models: tuple[ModelRow, ...]


class Difference(NamedTuple):
    """The difference of one figure between two reports.

    Attributes:
        what: the row of the report.
        figure: name of the figure.
        before: its value in the first report.
        after: its value in the second.
        change: relative; positive if the value grew.
        is_noise: the change is within the noise.
        is_worse: the change is beyond the noise and for the worse.
        depends_on_time: it is a speed, which varies between runs.
    """

    what: str
    figure: str
    before: float
    after: float
    change: float
    is_noise: bool
    is_worse: bool
    depends_on_time: bool = False

    @property
    def verdict(self) -> str:
        """One of "noise", "worse" and "better"."""
        if self.is_noise:
            return "noise"
        return "worse" if self.is_worse else "better"


class Estimate(NamedTuple):
    """A figure of a report, with its interval.

    Attributes:
        bounded: the figure with its interval.
        more_is_better: true for a speed; smaller values of other figures are better.
        relative: interval of the speed relative to the fixed work; None if it is no speed or was not measured.
        machine_seconds: duration of the fixed work; None if it was not measured.
    """

    bounded: Bounded
    more_is_better: bool
    relative: tuple[float, float] | None = None
    machine_seconds: float | None = None


def compare_reports(before: HasRows, after: HasRows) -> list[Difference]:
    """Return the difference of every figure that both reports have.

    Args:
        before: report of a benchmark.
        after: report of another one, of the same version.
    """
    old = {what: dict(estimates) for what, estimates in _rows(before)}
    return [
        _difference(what, name, old[what][name], estimate)
        for what, estimates in _rows(after)
        for name, estimate in estimates
        if name in old.get(what, ())
    ]


class Confirmation(NamedTuple):
    """The result of repeating measurements that looked like regressions.

    Attributes:
        worse: regressions that every repetition confirmed.
        cleared: those that a repetition did not confirm.
        repetitions: number of repetitions.
    """

    worse: list[Difference]
    cleared: list[Difference]
    repetitions: int


def confirm(
    before: HasRows,
    suspects: Sequence[Difference],
    measure_again: Callable[[Set[str]], HasRows],
    *,
    max_regression: float,
    most_repetitions: int,
) -> Confirmation:
    """Repeat the measurements of apparent regressions until none is left, or up to a number of repetitions.

    A single run may fall into a slow period of the machine that its interval does not show; a real regression appears
    in every run. Figures that do not depend on time are not repeated.

    Args:
        before: the baseline's report.
        suspects: result of `regressions` for the first run.
        measure_again: measures the rows of these names and returns them.
        max_regression: largest relative change for the worse that is accepted.
        most_repetitions: regressions that are left after these are confirmed.
    """
    certain = [suspect for suspect in suspects if not suspect.depends_on_time]
    doubtful = {(one.what, one.figure): one for one in suspects if one.depends_on_time}
    cleared: list[Difference] = []
    repetitions = 0
    while doubtful and repetitions < most_repetitions:
        again = compare_reports(before, measure_again({what for what, _ in doubtful}))
        worse_again = {(one.what, one.figure): one for one in regressions(again, max_regression)}
        cleared += [one for key, one in doubtful.items() if key not in worse_again]
        doubtful = {key: worse_again[key] for key in doubtful if key in worse_again}
        repetitions += 1
    return Confirmation([*certain, *doubtful.values()], cleared, repetitions)


def training_name(name: str, batch_size: int) -> str:
    """Return the name in a comparison of a row of a report's `training`."""
    return f"{name}, {batch_size} rows"


def regressions(differences: Iterable[Difference], max_regression: float) -> list[Difference]:
    """Return the differences that are worse, beyond the noise, by more than a share."""
    return [difference for difference in differences if difference.is_worse and abs(difference.change) > max_regression]


def _rows(report: HasRows) -> Iterator[tuple[str, Iterator[tuple[str, Estimate]]]]:
    """Yield the name of each row with its figures."""
    for training in report.training:
        yield training_name(training.name, training.batch_size), _training_figures(training)
    for model in report.models:
        yield model.model, _model_figures(model)


def _training_figures(row: TrainingRow) -> Iterator[tuple[str, Estimate]]:
    """Yield the name and estimate of each figure of a row of training."""
    if row.speed is not None:
        relative = row.low_relative_tokens_per_second, row.high_relative_tokens_per_second
        yield "tokens_per_second", _speed(row.speed, relative, row.machine_seconds)
    yield from _peak(row.peak_memory_bytes)


def _model_figures(row: ModelRow) -> Iterator[tuple[str, Estimate]]:
    """Yield the name and estimate of each figure of a model."""
    if row.decode_speed is not None:
        relative = row.low_relative_decode_tokens_per_second, row.high_relative_decode_tokens_per_second
        yield "decode_tokens_per_second", _speed(row.decode_speed, relative, row.machine_seconds)
    for one in row.prefill:
        relative = one.low_relative_tokens_per_second, one.high_relative_tokens_per_second
        yield f"prefill of {one.prompt_tokens}", _speed(one.speed, relative, row.machine_seconds)
    yield from _peak(row.peak_memory_bytes)
    if row.model_bytes is not None:
        yield "model_bytes", _size(row.model_bytes, 0)
    if row.perplexity is not None and row.perplexity_standard_error is not None:
        yield "perplexity", _size(row.perplexity, 2 * row.perplexity_standard_error)


def _speed(speed: Bounded, relative: tuple[float | None, float | None], machine_seconds: float | None) -> Estimate:
    """Return the estimate of a speed.

    Args:
        speed: tokens per second.
        relative: ends of the interval of the tokens in the time of the fixed work, where that was timed.
        machine_seconds: of the fixed work.
    """
    low, high = relative
    if not machine_seconds or low is None or high is None:
        return Estimate(speed, True)
    return Estimate(speed, True, (low, high), machine_seconds)


def _peak(peak_bytes: int | None) -> Iterator[tuple[str, Estimate]]:
    if peak_bytes is not None:
        yield "peak_memory_bytes", _size(peak_bytes, _PEAK_BAND * peak_bytes)


def _size(value: float, doubt: float) -> Estimate:
    """Return the estimate of a figure whose smaller values are better."""
    return Estimate(Bounded(value, value - doubt, value + doubt), False)


def _difference(what: str, figure: str, before: Estimate, after: Estimate) -> Difference:
    old, new = before.bounded.value, after.bounded.value
    (low, high), (other_low, other_high) = _ends(before, after)
    is_noise = other_low <= high and low <= other_high
    is_worse = not is_noise and (other_high < low) == after.more_is_better
    return Difference(what, figure, old, new, new / old - 1, is_noise, is_worse, after.more_is_better)


def _ends(before: Estimate, after: Estimate) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the two intervals to compare: relative to the fixed work if both have them."""
    if before.relative is None or after.relative is None or not before.machine_seconds or not after.machine_seconds:
        return (before.bounded.low, before.bounded.high), (after.bounded.low, after.bounded.high)
    doubt = math.exp(_DOUBT * abs(math.log(after.machine_seconds / before.machine_seconds)))
    return before.relative, (after.relative[0] / doubt, after.relative[1] * doubt)


# --- Markdown tables


def markdown_of_differences(differences: Sequence[Difference]) -> str:
    """Return a Markdown table with a line for each figure."""
    lines = ["| what | figure | before | after | change | |", "|---|---|---:|---:|---:|---|"]
    lines += [
        f"| {_cell(row.what)} | {row.figure} | {_number(row.before)} | {_number(row.after)} | {row.change:+.1%} "
        f"| {row.verdict} |"
        for row in differences
    ]
    return "\n".join(lines) + "\n"


def markdown_of_report(report: HasRows) -> str:
    """Return a report's training and models as two tables in Markdown; the first one only if training was timed."""
    training = [
        "| training | rows | tokens learned from/s | | processed/s "
        "| peak memory | waiting for data | the workflow is |",
        "|---|--:|--:|---|--:|--:|--:|---|",
        *(_training_line(row) for row in report.training),
        "",
    ]
    models = [
        "| model | size | smaller than fp32 | than the dense model | decode tokens/s | perplexity |",
        "|---|--:|--:|--:|--:|--:|",
        *(_model_line(row) for row in report.models),
    ]
    return "\n".join([*(training if report.training else []), *models]) + "\n"


def _training_line(row: TrainingRow) -> str:
    begin = f"| {_cell(row.name)} | {row.batch_size} |"
    if row.timed is None:
        return f"{begin} {_cell(row.error or '')} | | | | | |"
    against = ""
    if row.speedup is not None:
        ratio = f"{row.speedup.value:.2f} times as fast"
        against = f"{ratio} (noise)" if row.verdict == "noise" else ratio
    speed = row.timed.speed
    processed = speed.value if row.processed_tokens_per_second is None else row.processed_tokens_per_second
    return (
        f"{begin} {_number(speed.value)} | {_number(speed.low)} to {_number(speed.high)} "
        f"| {_number(processed)} "
        f"| {show_bytes(row.timed.peak_memory_bytes)} "
        f"| {row.timed.data_wait_share:.1%} | {against} |"
    )


def _model_line(row: ModelRow) -> str:
    figures = row.measured
    if figures is None:
        return f"| {_cell(row.model)} | {_cell(row.error or '')} | | | | |"
    perplexity = "-"
    if figures.perplexity is not None:
        perplexity = f"{figures.perplexity:.2f} ± {figures.perplexity_standard_error:.2f}"
    return (
        f"| {_cell(row.model)} | {show_bytes(figures.model_bytes)} | {figures.compression_ratio_fp32:.1f} times "
        f"| {figures.compression_ratio:.1f} times "
        f"| {_number(figures.decode_speed.value)} "
        f"| {perplexity} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
