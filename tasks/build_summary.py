"""What a build has made, in words: a line for each finished stage, and the models and the page at the end."""

import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxflow.messages.advice import command
from mlxflow.storage import layout
from mlxflow.workflow.stage_node import Node


def read_report(node: Node) -> dict[str, Any]:
    """Return the report of a stage; empty if it cannot be read."""
    try:
        return tomllib.loads((node.root / node.folder / layout.REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def key_figures(task: str, report: dict[str, Any]) -> str:
    """Return the figures of a finished stage that a reader looks for first; empty if its report has none of them.

    Args:
        task: the stage or variant.
        report: its `report.toml`.
    """
    try:
        return ", ".join(_FIGURES[task.partition(":")[0]](report))
    except (KeyError, TypeError, ValueError):  # a report of another version
        return ""


def _pretokenize(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['train']['tokens']:,} tokens to train on"
    yield f"{report['validation']['tokens']:,} held out"


def _train(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['steps']:,} steps"
    first, last = report["first_validation_perplexity"], report["last_validation_perplexity"]
    yield f"held-out perplexity {_perplexity(first)} -> {_perplexity(last)}"


def _quantize(report: dict[str, Any]) -> Iterator[str]:
    yield _size(report["model_bytes"])
    yield f"{report['bits_per_weight']:.2f} bits per weight"
    if quality := report.get("quality"):
        dense, own = quality["dense_perplexity"], quality["perplexity"]
        yield f"held-out perplexity {_perplexity(own)} (unquantized {_perplexity(dense)})"
    else:
        yield "quality not measured without data"


def _export(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['format']} {report['type']}".rstrip()
    yield _size(report["bytes"])
    yield f"{report['bits_per_weight']:.2f} bits per weight"
    if requantized := report.get("requantized"):
        yield f"{len(requantized)} quantized tensors encoded again"


def _profile(report: dict[str, Any]) -> Iterator[str]:
    yield f"peak memory {_size(report['peak_memory_bytes'])}"
    yield f"{report['median_step_seconds']:.3f} s a step"


def _benchmark(report: dict[str, Any]) -> Iterator[str]:
    speeds = {row["name"]: row["tokens_per_second"] for row in report["training"] if "tokens_per_second" in row}
    if "workflow" in speeds:
        yield f"training {speeds['workflow']:,.0f} tokens/s"
    models = len(report["models"])
    yield f"{models} model{'' if models == 1 else 's'} measured"


_FIGURES = {
    "pretokenize": _pretokenize,
    "train": _train,
    "quantize": _quantize,
    "export": _export,
    "profile": _profile,
    "benchmark": _benchmark,
}


def closing_lines(built: Sequence[Node], num_fresh: int, seconds: float) -> Iterator[str]:
    """Yield the summary of a build: how much was built, every model if they were measured, and where the page is.

    Args:
        built: the stages that ran, in their order.
        num_fresh: the number of those that did not have to.
        seconds: of the whole build.
    """
    fresh = f", {num_fresh} fresh" if num_fresh else ""
    yield f"{len(built)} {'stage' if len(built) == 1 else 'stages'} built in {seconds:,.1f} s{fresh}"
    for node in built:
        if node.task.partition(":")[0] == "benchmark":
            yield from _models(read_report(node))
    root = built[0].root
    page = layout.artifacts_folder(root) / layout.PAGE
    if page.is_file():
        state = ("is older than this build", "writes a new one") if _is_older(page, built) else ("", "shows it")
        shown = f"{Path(os.path.relpath(page)).as_posix()} {state[0]}".rstrip()
        yield f"page: {shown}  ({command('report --open')} {state[1]})"


def _is_older(page: Path, built: Sequence[Node]) -> bool:
    """Return whether a stage was built after the page was written: its figures are not on it."""
    reports = (node.root / node.folder / layout.REPORT for node in built if node.task != "report")
    return any(report.is_file() and report.stat().st_mtime_ns > page.stat().st_mtime_ns for report in reports)


def _models(report: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each model of a benchmark's report: size, held-out perplexity, speed of generating."""
    rows = [[row["model"], *_model_figures(row)] for row in report.get("models", []) if "model" in row]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _model_figures(row: dict[str, Any]) -> Iterator[str]:
    size, perplexity, speed = (row.get(key) for key in ("model_bytes", "perplexity", "decode_tokens_per_second"))
    yield _size(size) if size is not None else "-"
    yield f"held-out perplexity {_perplexity(perplexity)}" if perplexity is not None else "perplexity -"
    yield f"generates {speed:,.0f} tokens/s" if speed is not None else "-"


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}"


def _size(num_bytes: float) -> str:
    """Return a number of bytes in the unit that makes it easy to read."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes:,.0f} bytes"
