"""The corpus section: amount of text, lengths of documents, and everything that was left out."""

from collections.abc import Sequence

import msgspec

from mlxflow.report import charts
from mlxflow.report.elements import Block, Figure, Note, Section, Table
from mlxflow.report.formatting import clean, shorten, show, show_percent
from mlxflow.report.load_run import Run
from mlxflow.report.sections import beside
from mlxflow.report.stage_reports.pretokenize import PretokenizeReport

_MOST_BAD_RECORDS = 20

#: Reasons for leaving out parts of a source: field of its figures, and label.
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
    for one in run.of_kind("pretokenize"):
        report = one.figures(PretokenizeReport)
        blocks += _of_stage(one.task, report) if report else [Note(f"No corpus to show: {one.said}")]
    return blocks or [Note("No corpus to show: the workflow has no pretokenize stage.")]


def _of_stage(task: str, report: PretokenizeReport) -> list[Block]:
    figures = [
        (
            part,
            *map(show, (side.documents, side.tokens, side.targets, side.rows)),
            show_percent(side.real_token_share, 3),
        )
        for part, side in (("trained on", report.train), ("held out", report.validation))
    ]
    head = ("Part", "Documents", "Tokens", "Trained on", "Rows", "Real tokens")
    blocks: list[Block] = [Table(f"What {task} made", head, figures)]
    blocks += [Note(shorten(clean(line), 300)) for line in report.warnings]
    blocks += _lengths(task, report)
    blocks.append(_losses(report))
    if bad := report.bad_records:
        shown = [(shorten(clean(record), 300),) for record in bad[:_MOST_BAD_RECORDS]]
        more = f", the first {_MOST_BAD_RECORDS} of {len(bad)}" if len(bad) > _MOST_BAD_RECORDS else ""
        blocks.append(Table(f"Records that could not be read{more}", ("Record",), shown))
    return blocks


def _lengths(task: str, report: PretokenizeReport) -> list[Block]:
    """Return the distribution of document lengths of each source."""
    spans, cells = [], []
    for source in report.sources:
        known = msgspec.structs.astuple(source.tokens_per_document)
        name = shorten(clean(source.path), 60)
        values = tuple(max(1.0, value) for value in known if value is not None)
        if len(values) == len(known):
            spans.append(charts.Spread(name, (values[0], values[1], values[2], values[3], values[4])))
        cells.append((name, show(source.documents), *map(show, known)))
    if not spans:
        return [Note(f"{task} did not report how long its documents are.")]
    length = report.context_length
    label = f"Tokens in a document, by source, from the smallest to the largest. {_sentences(spans)}"
    drawn = charts.spans(spans, label=label, marker=length, marker_name=f"a row holds {show(length)} tokens")
    head = ("Source", "Documents", "Smallest", "5 %", "Median", "95 %", "Largest")
    caption = "Tokens in a document: smallest to largest, nine tenths in the box"
    caption += f"; the line is a row's {show(length)}" if length else ""
    return [Figure(caption, drawn, Table("Tokens in a document", head, cells, folded=True), wide=True)]


def _sentences(spans: list[charts.Spread]) -> str:
    return " ".join(f"{span.name}: median {show(span.values[2])}." for span in spans)


def _losses(report: PretokenizeReport) -> Block:
    sides = (report.train, report.validation)
    totals = [(words, sum(getattr(source, name) for source in report.sources)) for name, words in _SOURCE_LOSSES]
    totals += [(words, sum(getattr(side, name) for side in sides)) for name, words in _SIDE_LOSSES]
    rows = [(words, show(total)) for words, total in totals if total]
    if not rows:
        return Note("Nothing of the text was lost, cut or left out.")
    return Table("What was cut, dropped or left out", ("What", "Count"), rows)
