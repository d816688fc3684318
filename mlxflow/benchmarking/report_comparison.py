"""Compare two benchmark reports, and distinguish changes from noise.

A speed has two kinds of noise. Noise within a run is in its interval. Noise between runs shows in the fixed work that
is timed in every round (`machine_speed`): if it became slower, the machine did. Speeds are therefore compared relative
to the fixed work, and the interval is widened by a share of the machine's change, because other work may be affected
more or less by the same cause.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

# The relative noise of peaks, which depend a little on how far the host runs ahead
_PEAK_BAND = 0.05

# The share of a change of the machine's speed by which intervals are widened
_DOUBT = 0.2


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
    """A figure with its interval.

    Attributes:
        value: the figure.
        low: lower end of its interval.
        high: upper end.
        relative: interval of the speed relative to the fixed work; None if it is no speed or was not measured.
        machine_seconds: duration of the fixed work.
    """

    value: float
    low: float
    high: float
    relative: tuple[float, float] | None = None
    machine_seconds: float = 0.0


def compare_reports(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Return the difference of every figure that both reports have.

    Args:
        before: report of a benchmark.
        after: report of another one, of the same version.
    """
    found = []
    pairs = [
        *_pairs(before, after, "training", training_name),
        *_pairs(before, after, "models", lambda row: str(row["model"])),
    ]
    for what, old, new in pairs:
        figures = dict(_figures(old))
        for name, (band, more_is_better) in _figures(new):
            if name in figures:
                found.append(_difference(what, name, figures[name][0], band, more_is_better))
    return found


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
    before: Mapping[str, Any],
    suspects: Sequence[Difference],
    measure_again: Callable[[Set[str]], Mapping[str, Any]],
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
        measure_again: measures the rows of these names and returns their report.
        max_regression: largest relative change for the worse that is accepted.
        most_repetitions: regressions that are left after these are confirmed.
    """
    certain = [one for one in suspects if not one.depends_on_time]
    doubtful = {(one.what, one.figure): one for one in suspects if one.depends_on_time}
    cleared: list[Difference] = []
    repetitions = 0
    while doubtful and repetitions < most_repetitions:
        again = compare_reports(before, measure_again({what for what, _ in doubtful}))
        found = {(one.what, one.figure): one for one in regressions(again, max_regression)}
        cleared += [one for key, one in doubtful.items() if key not in found]
        doubtful = {key: found[key] for key in doubtful if key in found}
        repetitions += 1
    return Confirmation([*certain, *doubtful.values()], cleared, repetitions)


def training_name(row: Mapping[str, Any]) -> str:
    """Return the name in a comparison of a row of a report's `training`."""
    return f"{row['name']}, {row['batch_size']} rows"


def regressions(differences: Iterable[Difference], max_regression: float) -> list[Difference]:
    """Return the differences that are worse, beyond the noise, by more than a share."""
    return [one for one in differences if one.is_worse and abs(one.change) > max_regression]


def _pairs(
    before: Mapping[str, Any], after: Mapping[str, Any], table: str, name: Any
) -> Iterator[tuple[str, Any, Any]]:
    old = {name(row): row for row in before.get(table, ())}
    for row in after.get(table, ()):
        if name(row) in old:
            yield name(row), old[name(row)], row


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Estimate, bool]]]:
    """Yield the name, estimate, and whether more is better, of each figure of a row."""
    for name in ("tokens_per_second", "decode_tokens_per_second"):
        if name in row:
            yield name, (_speed(row, name, row.get("machine_seconds", 0.0)), True)
    for one in row.get("prefill", ()):
        speed = _speed(one, "tokens_per_second", row.get("machine_seconds", 0.0))
        yield f"prefill of {one['prompt_tokens']}", (speed, True)
    if "peak_memory_bytes" in row:
        peak = row["peak_memory_bytes"]
        yield "peak_memory_bytes", (Estimate(peak, peak * (1 - _PEAK_BAND), peak * (1 + _PEAK_BAND)), False)
    if "model_bytes" in row:
        yield "model_bytes", (Estimate(row["model_bytes"], row["model_bytes"], row["model_bytes"]), False)
    if "perplexity" in row:
        error = 2 * row["perplexity_standard_error"]
        value = row["perplexity"]
        yield "perplexity", (Estimate(value, value - error, value + error), False)


def _speed(row: Mapping[str, Any], name: str, machine_seconds: float) -> Estimate:
    ends = (f"low_relative_{name}", f"high_relative_{name}")
    relative = (row[ends[0]], row[ends[1]]) if machine_seconds and ends[0] in row else None
    return Estimate(row[name], row[f"low_{name}"], row[f"high_{name}"], relative, machine_seconds)


def _difference(what: str, figure: str, before: Estimate, after: Estimate, more_is_better: bool) -> Difference:
    change = after.value / before.value - 1
    (low, high), (other_low, other_high) = _ends(before, after)
    is_noise = other_low <= high and low <= other_high
    is_worse = not is_noise and (other_high < low) == more_is_better
    return Difference(what, figure, before.value, after.value, change, is_noise, is_worse, more_is_better)


def _ends(before: Estimate, after: Estimate) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the two intervals to compare: relative to the fixed work if both have them."""
    if before.relative is None or after.relative is None:
        return (before.low, before.high), (after.low, after.high)
    doubt = math.exp(_DOUBT * abs(math.log(after.machine_seconds / before.machine_seconds)))
    return before.relative, (after.relative[0] / doubt, after.relative[1] * doubt)


# --- Markdown tables


def markdown_of_differences(differences: Sequence[Difference]) -> str:
    """Return a Markdown table with a line for each figure."""
    lines = ["| what | figure | before | after | change | |", "|---|---|---:|---:|---:|---|"]
    lines += [
        f"| {_cell(one.what)} | {one.figure} | {_number(one.before)} | {_number(one.after)} | {one.change:+.1%} "
        f"| {one.verdict} |"
        for one in differences
    ]
    return "\n".join(lines) + "\n"


def markdown_of_report(report: Mapping[str, Any]) -> str:
    """Return a report's training and models as two tables in Markdown."""
    lines = [
        "| training | rows | tokens learned from/s | | processed/s | peak GB | waiting for data | the workflow is |",
        "|---|--:|--:|---|--:|--:|--:|---|",
    ]
    lines += [_training_line(row) for row in report.get("training", ())]
    lines += ["", "| model | MB | smaller than fp32 | than the trained model | decode tokens/s | perplexity |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    lines += [_model_line(row) for row in report.get("models", ())]
    return "\n".join(lines) + "\n"


def _training_line(row: Mapping[str, Any]) -> str:
    begin = f"| {_cell(row['name'])} | {row['batch_size']} |"
    if "error" in row:
        return f"{begin} {_cell(row['error'])} | | | | | |"
    against = ""
    if "workflow_speedup" in row:
        ratio = f"{row['workflow_speedup']:.2f} times as fast"
        against = f"{ratio} (noise)" if row["verdict"] == "noise" else ratio
    band = f"{_number(row['low_tokens_per_second'])} to {_number(row['high_tokens_per_second'])}"
    return (
        f"{begin} {_number(row['tokens_per_second'])} | {band} "
        f"| {_number(row.get('processed_tokens_per_second', row['tokens_per_second']))} "
        f"| {row['peak_memory_bytes'] / 1e9:.2f} "
        f"| {row['data_wait_share']:.1%} | {against} |"
    )


def _model_line(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"| {_cell(row['model'])} | {_cell(row['error'])} | | | | |"
    return (
        f"| {_cell(row['model'])} | {row['model_bytes'] / 1e6:.2f} | {row['compression_ratio_fp32']:.1f} times "
        f"| {row['compression_ratio']:.1f} times "
        f"| {_number(row['decode_tokens_per_second'])} "
        f"| {row['perplexity']:.2f} ± {row['perplexity_standard_error']:.2f} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
