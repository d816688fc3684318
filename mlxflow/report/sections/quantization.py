"""Quantized models: size and quality of each, bits and error by layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxflow.report import charts, line_plot
from mlxflow.report.elements import Block, Code, Figure, Note, Section, Table
from mlxflow.report.formatting import clean, number, shorten, show, show_bytes, show_interval, show_percent
from mlxflow.report.line_plot import Axes, Series
from mlxflow.report.load_run import LoadedStage, Run, rows, table
from mlxflow.report.sections import beside

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_ROWS = 500


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("quantization", "Quantization", beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    stages = run.of_kind("quantize")
    built = [one for one in stages if one.report]
    missing: list[Block] = [Note(f"{one.task} is not shown: {one.said}") for one in stages if not one.report]
    if not stages:
        return [Note("Nothing was quantized: the workflow has no quantize stage.")]
    if not built:
        return missing
    blocks: list[Block] = [_summary(built)]
    blocks += _layers(built)
    for one in built:
        chosen = one.report.get("layers_toml")
        if isinstance(chosen, str) and chosen.strip():
            blocks.append(
                Code(f"The layers' bits that the budget of {one.task} chose, to paste into its table", chosen)
            )
    return blocks + missing


def _summary(built: Sequence[LoadedStage]) -> Table:
    cells = []
    for one in built:
        report, quality = one.report, table(one.report, "quality")
        told = [str(report[key]) for key in ("method", "mode") if isinstance(report.get(key), str)]
        cells.append(
            (
                one.task,
                " ".join(told) or show(None),
                show(report.get("bits_per_weight")),
                show_bytes(report.get("model_bytes")),
                show(report.get("compression_ratio_fp32", report.get("compression_ratio"))),
                show(_against_dense(report)),
                show_interval(quality.get("perplexity"), quality.get("perplexity_standard_error")),
                show_interval(quality.get("dense_perplexity"), quality.get("dense_perplexity_standard_error")),
                show(quality.get("kl")),
                show_percent(quality.get("top1_agreement")),
            )
        )
    head = (
        "Model",
        "Method",
        "Bits a weight",
        "Size",
        "Times smaller than fp32",
        "Than the dense model",
        "Perplexity",
        "Dense perplexity",
        "KL, nats",
        "Same first choice",
    )
    return Table("Each quantized model", head, cells, words=(0, 1))


def _against_dense(report: dict[str, object]) -> float | None:
    """Return how many times smaller the weights are than those of the dense model in its own type."""
    dense, own = (number(report.get(key)) for key in ("dense_bits_per_weight", "bits_per_weight"))
    return dense / own if dense is not None and own else None


def _layers(built: Sequence[LoadedStage]) -> list[Block]:
    """Return bits and error of every layer of every model."""
    told = _rows_by_layer(built)
    names = list(dict.fromkeys(path for layers in told.values() for path in layers))
    if not names:
        return [Note("The quantize stages did not report bits and error by layer.")]
    blocks: list[Block] = []
    for key, title, logarithmic in (
        ("bits", "Bits of a weight's code, by layer", False),
        ("relative_error", "Relative error, by layer", True),
    ):
        series = [
            _layer_series(layers, names, key, index, len(told), task)
            for index, (task, layers) in enumerate([*told.items()][: charts.STYLES])
        ]
        if shown := [one for one in series if len(one.x)]:
            averages = " ".join(f"{one.name}: {show(_average(one.y))} on average." for one in shown)
            axes = Axes("layer, in the model's order", logarithmic=logarithmic, from_zero=not logarithmic, names=names)
            plot = line_plot.lines(shown, axes, label=f"{title}. {averages}", group="layers", height=180)
            legend = tuple((f"{one.style} dot", one.name) for one in shown)
            blocks.append(Figure(title, plot, legend=legend))
    if len(told) > charts.STYLES:
        blocks.append(Note(f"The plots show {charts.STYLES} of {len(told)} models; the table below has all of them."))
    blocks.append(_layer_table(told, names))
    return blocks


def _rows_by_layer(built: Sequence[LoadedStage]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the rows of each model's report by the path of the layer; models without any are left out."""
    found = {one.task: {str(row.get("path")): row for row in rows(one.report, "layers")} for one in built}
    return {task: layers for task, layers in found.items() if layers}


def _layer_series(
    layers: dict[str, dict[str, Any]], names: Sequence[str], key: str, index: int, num_models: int, task: str
) -> Series:
    """Return the points of one model: by layer, what is known and above zero.

    Args:
        layers: rows of the report, by path.
        names: the layers of all models, in the order of the axis.
        key: of the rows.
        index: the model's number.
        num_models: how many models there are; each is moved aside so that equal values do not hide each other.
        task: the model.
    """
    points = [(place, number(layers[name].get(key))) for place, name in enumerate(names) if name in layers]
    known = [
        (place, value) for place, value in points if value is not None and (value > 0 or (key == "bits" and value))
    ]
    aside = min(0.16, 0.8 / num_models) * (index - (num_models - 1) / 2)
    x, y = np.array([place + aside for place, _ in known]), np.array([value for _, value in known])
    return Series(task, x, y, charts.style_of(index), points=True)


def _average(values: "NDArray[np.float64]") -> float:
    """Return the mean of (N,) values; their sum alone may be beyond the largest number."""
    largest = float(np.abs(values).max()) or 1.0
    return float((values / largest).mean()) * largest


def _layer_table(told: dict[str, dict[str, dict[str, object]]], names: Sequence[str]) -> Table:
    head = ("Layer", *(f"{task}: {what}" for task in told for what in ("bits a weight", "error")))
    cells = []
    for name in names[:_MOST_ROWS]:
        layers = [layers.get(name, {}) for layers in told.values()]
        figures = [show(layer.get(key)) for layer in layers for key in ("bits_per_weight", "relative_error")]
        cells.append((shorten(clean(name), 80), *figures))
    more = f", the first {_MOST_ROWS} of {len(names)}" if len(names) > _MOST_ROWS else ""
    return Table(f"Every layer{more}", head, cells, folded=True)
