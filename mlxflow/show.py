"""An artifact for a person to look at."""

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxflow.errors import CallError
from mlxflow.workflow import Stage, Workflow

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_ROWS = 3


def show(workflow: Workflow, one: Stage, row: int | None) -> None:
    """Print what a stage made.

    Args:
        workflow: the workflow.
        one: a pretokenize stage.
        row: of its training rows, the one to print; None for a summary and the first ones.

    Raises:
        CallError: there is nothing to show of such a stage, or no such row.
        ArtifactError: it was not built.
    """
    if one.name != "pretokenize":
        raise CallError(f"{one.task}: there is nothing to show of it. Name a pretokenize stage.")
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    _show_tokens(console, workflow.root / one.folder, one.task, row)


def _show_tokens(console: "Console", folder: Path, task: str, row: int | None) -> None:
    from tokenizers import Tokenizer

    from mlxflow import artifact
    from mlxflow.data.token_file import TokenFile
    from mlxflow.stage import require

    train = TokenFile.open(require(folder / "train.safetensors", task))
    tokenizer = Tokenizer.from_file(str(require(folder / "tokenizer.json", task)))
    names = require(folder / "files.txt", task).read_text(encoding="utf-8").splitlines()
    count = train.rows.num_rows
    if row is not None and not 0 <= row < count:
        raise CallError(f"show {task}: --row = {row}: expected 0 to {count - 1:,}. Name one of the training rows.")
    if row is None:
        for line in _summary(artifact.read_report(folder / "report.toml")):
            console.print(line)
    for number in range(min(_SHOWN_ROWS, count)) if row is None else [row]:
        _show_row(console, train, tokenizer, names, number)


def _summary(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a summary."""
    for side in ("train", "validation"):
        told = report[side]
        yield (
            f"{side}: {told['documents']:,} documents, {told['tokens']:,} tokens ({told['targets']:,} trained on) in "
            f"{told['rows']:,} rows of {report['context_length'] + 1}, {told['real_token_share']:.3%} real"
        )
    for source in report["sources"]:
        lengths = source["tokens_per_document"]
        yield (
            f"{source['path']}: {source['documents']:,} documents of {lengths.get('p50', 0):,} tokens (median), "
            f"{source['bytes_per_token']} bytes a token, {source['duplicates']:,} duplicates, "
            f"{source['bad_records']:,} bad records"
        )


def _show_row(console: "Console", train: Any, tokenizer: Any, names: list[str], row: int) -> None:
    """Print one row: a line where each document begins, and its text; what is not trained on is set apart."""
    from rich.text import Text

    tokens, marks = train.rows.tokens[row], train.rows.marks[row]
    pieces = train.pieces(row)
    real, trained = int((marks > 0).sum()), int((marks & 1).sum())
    console.print(
        Text(f"\nrow {row:,}: {real} of {len(tokens)} tokens, {trained} trained on, {len(pieces)} pieces", "bold")
    )
    for piece in pieces:
        file, place = train.place(piece.document)
        where = names[file] + (f":{place}" if place else "")
        part = f", from its token {piece.document_begin:,}" if piece.document_begin else ""
        console.print(
            Text(f"--- document {piece.document:,} ({where}): {piece.end - piece.begin} tokens{part}", "cyan")
        )
        shown = Text()
        spans = zip(
            tokens[piece.begin : piece.end].tolist(), (marks[piece.begin : piece.end] & 1).tolist(), strict=True
        )
        for is_trained, run in groupby(spans, key=lambda one: one[1]):
            text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
            if is_trained:
                shown.append(text)
            else:
                shown.append(text if sys.stdout.isatty() else f"[[{text}]]", "dim reverse")
        console.print(shown)
