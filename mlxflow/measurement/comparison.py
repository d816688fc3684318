"""Two benchmark reports side by side: what changed, and what is noise."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# Peaks depend a little on how far the host ran ahead
_PEAK_BAND = 0.05


class Difference(NamedTuple):
    """One figure of two reports.

    Attributes:
        what: the row that it stands in.
        figure: its name.
        before: in the first report.
        after: in the second.
        change: relative; more than 0 is more.
        is_noise: the change is within the noise of the two.
        is_worse: it is not noise, and for the worse.
    """

    what: str
    figure: str
    before: float
    after: float
    change: float
    is_noise: bool
    is_worse: bool

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.is_noise:
            return "noise"
        return "worse" if self.is_worse else "better"


class Band(NamedTuple):
    """A figure and what it may be."""

    value: float
    low: float
    high: float


def compare_reports(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Return every figure that both reports have.

    Args:
        before: a benchmark's report.
        after: another one, of the same version.
    """
    found = []
    pairs = [
        *_pairs(before, after, "training", lambda row: f"{row['name']}, {row['batch_size']} rows"),
        *_pairs(before, after, "models", lambda row: str(row["model"])),
    ]
    for what, old, new in pairs:
        figures = dict(_figures(old))
        for name, (band, more_is_better) in _figures(new):
            if name in figures:
                found.append(_difference(what, name, figures[name][0], band, more_is_better))
    return found


def regressions(differences: Iterable[Difference], max_regression: float) -> list[Difference]:
    """Return what is worse, beyond the noise and by more than a share."""
    return [one for one in differences if one.is_worse and abs(one.change) > max_regression]


def _pairs(
    before: Mapping[str, Any], after: Mapping[str, Any], table: str, name: Any
) -> Iterator[tuple[str, Any, Any]]:
    old = {name(row): row for row in before.get(table, ())}
    for row in after.get(table, ()):
        if name(row) in old:
            yield name(row), old[name(row)], row


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Band, bool]]]:
    """Yield name, value with what it may be, and whether more is better."""
    for name in ("tokens_per_second", "decode_tokens_per_second"):
        if name in row:
            yield name, (Band(row[name], row[f"low_{name}"], row[f"high_{name}"]), True)
    for one in row.get("prefill", ()):
        rate = Band(one["tokens_per_second"], one["low_tokens_per_second"], one["high_tokens_per_second"])
        yield f"prefill of {one['prompt_tokens']}", (rate, True)
    if "peak_memory_bytes" in row:
        peak = row["peak_memory_bytes"]
        yield "peak_memory_bytes", (Band(peak, peak * (1 - _PEAK_BAND), peak * (1 + _PEAK_BAND)), False)
    if "model_bytes" in row:
        yield "model_bytes", (Band(row["model_bytes"], row["model_bytes"], row["model_bytes"]), False)
    if "perplexity" in row:
        error = 2 * row["perplexity_standard_error"]
        value = row["perplexity"]
        yield "perplexity", (Band(value, value - error, value + error), False)


def _difference(what: str, figure: str, before: Band, after: Band, more_is_better: bool) -> Difference:
    change = after.value / before.value - 1
    is_noise = after.low <= before.high and before.low <= after.high
    is_worse = not is_noise and (change < 0) == more_is_better
    return Difference(what, figure, before.value, after.value, change, is_noise, is_worse)


# --- tables to paste


def markdown_of_differences(differences: Sequence[Difference]) -> str:
    """Return a table in Markdown, a line for each figure."""
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
        "| training | rows | tokens/s | | peak GB | waiting for data | the workflow is |",
        "|---|--:|--:|---|--:|--:|---|",
    ]
    lines += [_training_line(row) for row in report.get("training", ())]
    lines += ["", "| model | MB | smaller than fp32 | decode tokens/s | perplexity |", "|---|--:|--:|--:|--:|"]
    lines += [_model_line(row) for row in report.get("models", ())]
    return "\n".join(lines) + "\n"


def _training_line(row: Mapping[str, Any]) -> str:
    begin = f"| {_cell(row['name'])} | {row['batch_size']} |"
    if "error" in row:
        return f"{begin} {_cell(row['error'])} | | | | |"
    against = ""
    if "workflow_speedup" in row:
        ratio = f"{row['workflow_speedup']:.2f} times as fast"
        against = f"{ratio} (noise)" if row["verdict"] == "noise" else ratio
    band = f"{_number(row['low_tokens_per_second'])} to {_number(row['high_tokens_per_second'])}"
    return (
        f"{begin} {_number(row['tokens_per_second'])} | {band} | {row['peak_memory_bytes'] / 1e9:.2f} "
        f"| {row['data_wait_share']:.1%} | {against} |"
    )


def _model_line(row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"| {_cell(row['model'])} | {_cell(row['error'])} | | | |"
    return (
        f"| {_cell(row['model'])} | {row['model_bytes'] / 1e6:.2f} | {row['compression_ratio_fp32']:.1f} times "
        f"| {_number(row['decode_tokens_per_second'])} "
        f"| {row['perplexity']:.2f} ± {row['perplexity_standard_error']:.2f} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"
