"""The quantization section: size and quality of each model, bits and error by layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlxflow.report import colors, line_plot
from mlxflow.report.elements import Block, Code, Figure, Note, Section, Table
from mlxflow.report.formatting import UNKNOWN, clean, shorten, show, show_bytes, show_interval, show_percent
from mlxflow.report.line_plot import Axes, Series
from mlxflow.report.load_run import Run
from mlxflow.report.sections import beside
from mlxflow.report.sections.quality_curve import quality_curve
from mlxflow.report.stage_reports.quantize import LayerFigures, QualityFigures, QuantizeReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_ROWS = 500


def section(runs: Sequence[Run]) -> Section:
    """Return the section."""
    return Section("quantization", "Quantization", beside(runs, _blocks))


def _blocks(run: Run) -> list[Block]:
    stages = run.of_kind("quantize")
    built = {stage.task: report for stage in stages if (report := stage.figures(QuantizeReport)) is not None}
    missing: list[Block] = [Note(f"{one.task} is not shown: {one.said}") for one in stages if one.task not in built]
    if not stages:
        return [Note("Nothing was quantized: the workflow has no quantize stage.")]
    if not built:
        return missing
    styles = colors.styles_of_models([*run.models, *built])
    blocks: list[Block] = [_summary(built), *quality_curve(built, styles)]
    blocks += _layers({task: {layer.path: layer for layer in report.layers} for task, report in built.items()}, styles)
    for task, report in built.items():
        if report.layers_toml:
            title = f"The layers' bits that the budget of {task} chose, to paste into its table"
            blocks.append(Code(title, report.layers_toml))
    return blocks + missing


def _summary(built: Mapping[str, QuantizeReport]) -> Table:
    cells = []
    for task, report in built.items():
        dense, own = report.dense_bits_per_weight, report.bits_per_weight
        cells.append(
            (
                task,
                f"{report.method} {report.mode}",
                show(own),
                show_bytes(report.model_bytes),
                show(report.compression_ratio_fp32),
                show(dense / own if own else None),
                *_quality_cells(report.quality),
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


def _quality_cells(quality: QualityFigures | None) -> tuple[str, ...]:
    if quality is None:
        return (UNKNOWN,) * 4
    return (
        show_interval(quality.perplexity, quality.perplexity_standard_error),
        show_interval(quality.dense_perplexity, quality.dense_perplexity_standard_error),
        show(quality.kl),
        show_percent(quality.top1_agreement),
    )


def _layers(by_task: Mapping[str, Mapping[str, LayerFigures]], styles: Mapping[str, str]) -> list[Block]:
    """Return bits and error of every layer of every model.

    Args:
        by_task: layers of each model by path.
        styles: of each model.
    """
    names = list(dict.fromkeys(path for layers in by_task.values() for path in layers))
    if not names:
        return [Note("The quantize stages did not report bits and error by layer.")]
    blocks: list[Block] = []
    for figure, title, logarithmic in (
        (_bits, "Bits of a weight's code, by layer", False),
        (_relative_error, "Relative error, by layer", True),
    ):
        series = [
            _layer_series(layers, names, figure, index, len(by_task), task)._replace(style=styles[task])
            for index, (task, layers) in enumerate([*by_task.items()][: colors.STYLES])
        ]
        if shown := [curve for curve in series if len(curve.x)]:
            averages = " ".join(f"{one.name}: {show(_average(one.y))} on average." for one in shown)
            axes = Axes("layer, in the model's order", logarithmic=logarithmic, from_zero=not logarithmic, names=names)
            plot = line_plot.lines(shown, axes, label=f"{title}. {averages}", group="layers", height=180)
            legend = tuple((f"{one.style} dot", one.name) for one in shown)
            blocks.append(Figure(title, plot, legend=legend))
    if len(by_task) > colors.STYLES:
        shown_of = f"{colors.STYLES} of {len(by_task)} models"
        blocks.append(Note(f"The plots show {shown_of}; the table below has all of them."))
    blocks.append(_layer_table(by_task, names))
    return blocks


def _bits(layer: LayerFigures) -> float:
    return layer.bits


def _relative_error(layer: LayerFigures) -> float:
    return layer.relative_error


def _layer_series(
    layers: Mapping[str, LayerFigures],
    names: Sequence[str],
    figure: Callable[[LayerFigures], float],
    index: int,
    num_models: int,
    task: str,
) -> Series:
    """Return the points of one model: positive values by layer.

    Args:
        layers: of the model, by path.
        names: the layers of all models, in the order of the axis.
        figure: returns the value of a layer.
        index: the model's number.
        num_models: number of models; each is shifted so that equal values do not hide each other.
        task: the model.
    """
    points = [(place, figure(layers[name])) for place, name in enumerate(names) if name in layers]
    known = [(place, value) for place, value in points if value > 0]
    aside = min(0.16, 0.8 / num_models) * (index - (num_models - 1) / 2)
    x, y = np.array([place + aside for place, _ in known]), np.array([value for _, value in known])
    return Series(task, x, y, colors.style_of(index), points=True)


def _average(values: "NDArray[np.float64]") -> float:
    """Return the mean of (N,) values, whose sum may overflow."""
    largest = float(np.abs(values).max()) or 1.0
    return float((values / largest).mean()) * largest


def _layer_table(by_task: Mapping[str, Mapping[str, LayerFigures]], names: Sequence[str]) -> Table:
    head = ("Layer", *(f"{task}: {what}" for task in by_task for what in ("bits a weight", "error")))
    cells = []
    for name in names[:_MOST_ROWS]:
        layers_of_name = [layers.get(name) for layers in by_task.values()]
        figures = [(layer.bits_per_weight, layer.relative_error) if layer else (None, None) for layer in layers_of_name]
        cells.append((shorten(clean(name), 80), *(show(value) for pair in figures for value in pair)))
    more = f", the first {_MOST_ROWS} of {len(names)}" if len(names) > _MOST_ROWS else ""
    return Table(f"Every layer{more}", head, cells, folded=True)
