"""The quality of all quantized models against their size: a point with its standard error for each, and the front."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlxflow.report import colors, line_plot
from mlxflow.report.elements import Block, Figure, Note, Table
from mlxflow.report.formatting import show, show_interval
from mlxflow.report.line_plot import Axes, Series, Whisker
from mlxflow.report.stage_reports.quantize import QuantizeReport

#: The name of the line through the models that no other one beats.
FRONT = "Pareto front"

# Standard errors on each side of a point
_ERRORS = 1.96

# The scale is logarithmic if one divergence is so many times another; there an interval ends at a share of its value
_WIDE, _MOST_BELOW = 20, 10


class ModelPoint(NamedTuple):
    """A quantized model.

    Attributes:
        task: the stage.
        bits_per_weight: stored, of all parameters.
        kl: divergence from the dense model in nats per token.
        standard_error: of the divergence.
    """

    task: str
    bits_per_weight: float
    kl: float
    standard_error: float


def points_of(built: Mapping[str, QuantizeReport]) -> list[ModelPoint]:
    """Return the models whose quality was measured, the smallest first."""
    points = [
        ModelPoint(task, report.bits_per_weight, report.quality.kl, report.quality.kl_standard_error)
        for task, report in built.items()
        if report.quality is not None
    ]
    points = [one for one in points if all(math.isfinite(value) for value in one[1:])]
    return sorted(points, key=lambda one: (one.bits_per_weight, one.kl))


def pareto_front(points: Sequence[ModelPoint]) -> list[ModelPoint]:
    """Return the models such that no other one is as small and diverges as little, the smallest first.

    Args:
        points: in the order of `points_of`.
    """
    front: list[ModelPoint] = []
    for point in points:
        if not front or point.kl < front[-1].kl:
            front.append(point)
    return front


def quality_curve(built: Mapping[str, QuantizeReport], styles: Mapping[str, str]) -> list[Block]:
    """Return the plot of divergence over stored bits, and its table; nothing for fewer than two measured models.

    Args:
        built: the reports of the models, by stage.
        styles: of each model.
    """
    points = points_of(built)
    if len(points) < 2:
        return []
    blocks: list[Block] = [_figure(points, styles), _table(points)]
    if len({report.quality.text for report in built.values() if report.quality is not None}) > 1:
        blocks.append(Note("These models were judged on different texts: their divergences cannot be compared."))
    return blocks


def _figure(points: Sequence[ModelPoint], styles: Mapping[str, str]) -> Figure:
    front, shown = pareto_front(points), points[: colors.STYLES]
    series = [
        Series(FRONT, np.array([one.bits_per_weight for one in front]), np.array([one.kl for one in front]), "front")
    ]
    for one in shown:
        place = np.array([one.bits_per_weight]), np.array([one.kl])
        series.append(Series(one.task, *place, styles[one.task], points=True))
    least, most = min(one.kl for one in points), max(one.kl for one in points)
    is_wide = 0 < _WIDE * least < most
    title = "Quality against size: divergence from the dense model, with its 95 % interval"
    plot = line_plot.lines(
        series,
        Axes("stored bits a weight, of all parameters", logarithmic=is_wide, from_zero=not is_wide),
        label=f"{title}. On the Pareto front: {', '.join(one.task for one in front)}.",
        group="quality",
        intervals=[_interval(one, styles[one.task], from_zero=not is_wide) for one in shown],
    )
    legend = ((series[0].style, FRONT), *((f"{styles[one.task]} dot", one.task) for one in shown))
    return Figure(title, plot, legend=legend, wide=True)


def _table(points: Sequence[ModelPoint]) -> Table:
    names = {one.task for one in pareto_front(points)}
    cells = [
        (
            one.task,
            show(one.bits_per_weight),
            show_interval(one.kl, one.standard_error),
            "yes" if one.task in names else "no",
        )
        for one in points
    ]
    head = ("Model", "Stored bits a weight", "KL, nats", "On the Pareto front")
    return Table("Quality against size", head, cells, words=(0, 3))


def _interval(point: ModelPoint, style: str, *, from_zero: bool) -> Whisker:
    reach = _ERRORS * point.standard_error
    low = max(point.kl - reach, 0.0 if from_zero else point.kl / _MOST_BELOW)
    return Whisker(point.bits_per_weight, low, point.kl + reach, style)
