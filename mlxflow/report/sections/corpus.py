"""The corpus: how much text, how long its documents are, and what of it was lost on the way."""

from collections.abc import Sequence
from typing import Any

from mlxflow.report import charts
from mlxflow.report.elements import Block, Figure, Note, Section, Table
from mlxflow.report.formatting import clean, number, shorten, show, show_percent
from mlxflow.report.load_run import LoadedStage, Run, rows, table
from mlxflow.report.sections import beside

_LENGTHS = ("smallest", "p05", "p50", "p95", "largest")
_MOST_BAD_RECORDS = 20

#: What a source may lose, by the key of the report.
_SOURCE_LOSSES = (
    ("duplicates", "documents that were there before"),
    ("bad_records", "records that could not be read"),
    ("blank_documents", "documents without text"),
    ("masked_documents", "documents without a token to learn"),
    ("test_documents", "documents kept out by their names, as a test"),
    ("empty_files", "empty files"),
    ("binary_files", "files that are no text"),
    ("hidden_files", "hidden files"),
    ("broken_links", "links to nothing"),
)
_SIDE_LOSSES = (
    ("cut_documents", "documents cut into several rows"),
    ("needlessly_cut", "of these, cut though a row would have held them"),
    ("truncated", "documents cut short, their ends lost"),
    ("dropped", "documents dropped"),
    ("rows_without_targets", "rows without a token to learn"),
)


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("data", "Data", beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    blocks: list[Block] = []
    stages = run.of_kind("pretokenize")
    for one in stages:
        blocks += _of_stage(one) if one.report else [Note(f"No corpus to show: {one.said}")]
    return blocks or [Note("No corpus to show: the workflow has no pretokenize stage.")]


def _of_stage(one: LoadedStage) -> list[Block]:
    sides = [(side, table(one.report, side)) for side in ("train", "validation")]
    figures = tuple(
        (
            {"train": "trained on", "validation": "held out"}[side],
            *(show(told.get(key)) for key in ("documents", "tokens", "targets", "rows")),
            show_percent(told.get("real_token_share"), 3),
        )
        for side, told in sides
    )
    head = ("Part", "Documents", "Tokens", "Learnt from", "Rows", "Real tokens")
    blocks: list[Block] = [Table(f"What {one.task} made", head, list(figures))]
    warned = one.report.get("warnings")
    blocks += [Note(shorten(clean(str(line)), 300)) for line in (warned if isinstance(warned, list) else [])]
    blocks += _lengths(one)
    blocks.append(_losses(one.report, sides))
    bad = one.report.get("bad_records")
    if isinstance(bad, list) and bad:
        shown = [(shorten(clean(_word(record)), 300),) for record in bad[:_MOST_BAD_RECORDS]]
        more = f", the first {_MOST_BAD_RECORDS} of {len(bad)}" if len(bad) > _MOST_BAD_RECORDS else ""
        blocks.append(Table(f"Records that could not be read{more}", ("Record",), shown))
    return blocks


def _word(record: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.items()) if isinstance(record, dict) else str(record)


def _lengths(one: LoadedStage) -> list[Block]:
    """Return the spread of the documents' lengths of each source."""
    spans, cells = [], []
    for source in rows(one.report, "sources"):
        known = [number(table(source, "tokens_per_document").get(key)) for key in _LENGTHS]
        name = shorten(clean(str(source.get("path", "a source"))), 60)
        values = tuple(max(1.0, value) for value in known if value is not None)
        if len(values) == len(_LENGTHS):
            spans.append(charts.Spread(name, (values[0], values[1], values[2], values[3], values[4])))
        cells.append((name, show(source.get("documents")), *(show(value) for value in known)))
    if not spans:
        return [Note(f"{one.task} did not report how long its documents are.")]
    length = number(one.report.get("context_length"))
    label = f"Tokens in a document, by source, from the smallest to the largest. {_sentences(spans)}"
    drawn = charts.spans(spans, label=label, marker=length, marker_name=f"a row holds {show(length)} tokens")
    head = ("Source", "Documents", "Smallest", "5 %", "Median", "95 %", "Largest")
    caption = "Tokens in a document: smallest to largest, nine tenths in the box"
    caption += f"; the line is a row's {show(length)}" if length else ""
    return [Figure(caption, drawn, Table("Tokens in a document", head, cells, folded=True), wide=True)]


def _sentences(spans: list[charts.Spread]) -> str:
    return " ".join(f"{span.name}: median {show(span.values[2])}." for span in spans)


def _losses(report: dict[str, Any], sides: list[tuple[str, dict[str, Any]]]) -> Block:
    found: list[tuple[str, str]] = []
    for key, words in _SOURCE_LOSSES:
        counts = [number(source.get(key)) for source in rows(report, "sources")]
        if total := sum(count for count in counts if count):
            found.append((words, show(total)))
    for key, words in _SIDE_LOSSES:
        if total := sum(count for _, told in sides if (count := number(told.get(key)))):
            found.append((words, show(total)))
    if not found:
        return Note("Nothing of the text was lost, cut or left out.")
    return Table("What was cut, dropped or left out", ("What", "Count"), found)
