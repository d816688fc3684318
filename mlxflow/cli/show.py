"""`mlxflow show`: the contents of a stage's artifact."""

import argparse
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxflow.cli.arguments import add_workflow, read_stage
from mlxflow.messages import terminal
from mlxflow.messages.advice import advise_build
from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.messages.errors import CallError
from mlxflow.messages.markdown_tables import table_of, write_markdown
from mlxflow.report.stage_reports.pretokenize import PretokenizeReport
from mlxflow.report.stage_reports.quantize import QuantizeReport
from mlxflow.storage import layout, report_structs
from mlxflow.workflow.model import Stage, Workflow

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_ROWS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlxflow show`."""
    parser.add_argument("stage", help="such as pretokenize, train or quantize:q4")
    parser.add_argument(
        "--row",
        type=int,
        help="of pretokenize: number of a training row, from 0; default: a summary and the first ones",
    )
    add_workflow(parser)


def run(parsed: argparse.Namespace) -> None:
    """Print the artifact of a stage."""
    workflow, one = read_stage(parsed)
    show(workflow, one, parsed.row)


def show(workflow: Workflow, stage: Stage, row: int | None) -> None:
    """Print the contents of a stage's artifact.

    Args:
        workflow: the workflow.
        stage: one of its stages.
        row: number of the training row of a pretokenize stage to print; None for a summary and the first rows.

    Raises:
        CallError: there is no such row.
        ArtifactError: it is not built.
        SourceError: its tokenizer takes too much time or memory.
    """
    if row is not None and stage.name != "pretokenize":
        raise CallError(f"show {stage.task}: --row = {row}: only pretokenize has rows. Remove the option.")
    console = terminal.console(soft_wrap=True)
    if stage.name == "quantize":
        _show_layers(console, workflow.root / stage.folder, stage.task)
    elif stage.name == "pretokenize":
        _show_tokens(console, workflow.root / stage.folder, stage.task, row)
    else:
        _show_figures(workflow.root / stage.folder, stage.task)


def _show_figures(folder: Path, task: str) -> None:
    """Print the figures of a stage whose artifact is a model or a report."""
    from mlxflow.cli.stage_texts import FORMS, text_of
    from mlxflow.workflow.stage import require

    path = require(folder / layout.REPORT, task)
    read = report_structs.read(path, FORMS[task.partition(":")[0]], advice=advise_build(task))
    write_markdown(text_of(read.figures, folder, task))


def _show_layers(console: "Console", folder: Path, task: str) -> None:
    """Print a line for each layer of the quantized model, then its total sizes."""
    from mlxflow.workflow.stage import require

    path = require(folder / layout.REPORT, task)
    report = report_structs.read(path, QuantizeReport, advice=advise_build(task)).figures
    titles = ("layer", "shape", "mode", "bits", "group", "bytes", "bits/weight", "error")
    rows = [
        (
            layer.path,
            " x ".join(map(str, layer.shape)),
            layer.mode,
            str(layer.bits) if layer.bits > 0 else "-",
            str(layer.group_size) if layer.bits > 0 else "-",
            f"{layer.bytes:,}",
            f"{layer.bits_per_weight:.2f}",
            f"{layer.relative_error:.3g}" if layer.bits > 0 else "-",
        )
        for layer in report.layers
    ]
    write_markdown(f"{table_of(titles, rows)}\n")
    console.print(
        f"{task}: {report.parameters:,} parameters in {show_bytes(report.model_bytes)}, "
        f"{report.bits_per_weight:.2f} bits a weight; {report.compression_ratio_fp32:.2f} times smaller than "
        f"fp32, {report.compression_ratio_bf16:.2f} than bf16"
    )
    if quality := report.quality:
        console.print(
            f"perplexity {quality.dense_perplexity:.4g} -> {quality.perplexity:.4g} "
            f"(+- {quality.perplexity_standard_error:.2g}), divergence {quality.kl:.3g} nats a token, "
            f"{quality.top1_agreement:.1%} of the likeliest tokens equal"
        )
    else:
        console.print("quality not measured without data: name a pretokenize stage in its key data")
    for line in report.warnings:
        console.print(line)


def _show_tokens(console: "Console", folder: Path, task: str, row: int | None) -> None:
    from mlxflow.data.guarded_tokenizer import GuardedTokenizer
    from mlxflow.data.token_file import TokenFile
    from mlxflow.workflow.stage import require

    train = TokenFile.open(require(folder / "train.safetensors", task))
    tokenizer_file = require(folder / "tokenizer.json", task)
    tokenizer = GuardedTokenizer(folder, str(tokenizer_file))
    tokenizer.open()
    names = require(folder / "files.txt", task).read_text(encoding="utf-8", errors="replace").splitlines()
    count = train.rows.num_rows
    if row is not None and not 0 <= row < count:
        raise CallError(f"show {task}: --row = {row}: expected 0 to {count - 1:,}. Name one of the training rows.")
    if row is None:
        read = report_structs.read(folder / layout.REPORT, PretokenizeReport, advice=advise_build(task))
        for line in _summary(read.figures):
            console.print(line)
    for number in range(min(_SHOWN_ROWS, count)) if row is None else [row]:
        _show_row(console, train, tokenizer, names, number)


def _summary(report: PretokenizeReport) -> Iterator[str]:
    """Yield the lines of a summary."""
    for name, side in (("train", report.train), ("validation", report.validation)):
        yield (
            f"{name}: {side.documents:,} documents, {side.tokens:,} tokens ({side.targets:,} trained on) in "
            f"{side.rows:,} rows of {report.context_length + 1}, {side.real_token_share:.3%} real"
        )
    for source in report.sources:
        median = source.tokens_per_document.p50 or 0
        yield (
            f"{source.path}: {source.documents:,} documents of {median:,} tokens (median), "
            f"{source.bytes_per_token} bytes a token, {source.duplicates:,} duplicates, "
            f"{source.bad_records:,} bad records"
        )
    yield from report.warnings


def _show_row(console: "Console", train: Any, tokenizer: Any, names: list[str], row: int) -> None:
    """Print one row: a header line for each document, and its text; text that is not trained on is marked."""
    from rich.text import Text

    tokens, marks = train.rows.tokens[row], train.rows.marks[row]
    pieces = train.pieces(row)
    real, trained = int((marks > 0).sum()), int((marks & 1).sum())
    held = f"{len(pieces)} piece{'s' if len(pieces) > 1 else ''} of documents"
    console.print(Text(f"\nrow {row:,}: {real} of {len(tokens)} tokens, {trained} trained on, {held}", "bold"))
    for piece in pieces:
        file, place = train.place(piece.document)
        where = terminal.one_line(names[file] if file < len(names) else f"file {file}") + (f":{place}" if place else "")
        part = f", from its token {piece.document_begin:,}" if piece.document_begin else ""
        console.print(
            Text(f"--- document {piece.document:,} ({where}): {piece.end - piece.begin} tokens{part}", "cyan")
        )
        shown = Text()
        spans = zip(
            tokens[piece.begin : piece.end].tolist(), (marks[piece.begin : piece.end] & 1).tolist(), strict=True
        )
        for is_trained, run in groupby(spans, key=lambda one: one[1]):
            text = terminal.escaped(tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
            if is_trained:
                shown.append(text)
            else:
                shown.append(text if sys.stdout.isatty() else f"[[{text}]]", "dim reverse")
        console.print(shown)
