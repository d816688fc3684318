import math
from typing import Any

from mlxflow.benchmarking.convergence import LossPoint, converge, curves_of
from mlxflow.benchmarking.time_budget import Budget
from tests.benchmarking.small_steps import open_runner, workflow_recipe
from tests.small_models import FREE


def test_curves_have_the_tokens_and_seconds_to_the_loss_that_all_reached() -> None:
    points = {
        "baseline": [LossPoint(1, 1, 0.0, 4.0), LossPoint(2, 2, 5.0, 3.0), LossPoint(3, 3, 9.0, 2.5)],
        "workflow": [LossPoint(1, 1, 0.0, 4.0), LossPoint(2, 2, 2.0, 2.4), LossPoint(3, 3, 4.0, 2.0)],
    }
    curves = curves_of(points)
    assert [curve.loss for curve in curves] == [(4.0, 3.0, 2.5), (4.0, 2.4, 2.0)]
    assert [(one.same_loss, one.tokens_to_loss, one.seconds_to_loss) for one in curves] == [
        (2.5, 3, 9.0),
        (2.5, 2, 2.0),
    ]


class _Diverging:
    """A runner whose loss is finite for so many steps."""

    def __init__(self, finite: int) -> None:
        self.targets = 0
        self._finite = finite

    def run(self, count: int) -> list[float]:
        losses = [
            3.0 - 0.1 * step if step < self._finite else math.nan for step in range(self.targets, self.targets + count)
        ]
        self.targets += count
        return losses


def test_a_curve_ends_before_its_loss_is_not_finite() -> None:
    lines: list[str] = []
    runners: Any = {"baseline": _Diverging(2), "workflow": _Diverging(9), "third": _Diverging(0)}
    curves = converge(runners, num_steps=4, budget=Budget(0.0, task="benchmark", say=lines.append))
    assert [(curve.name, curve.steps, curve.tokens_to_loss) for curve in curves] == [
        ("baseline", (1, 2), 2),
        ("workflow", (1, 2, 3, 4), 2),
    ]
    assert lines == [
        "benchmark: convergence: the loss of baseline did not stay finite; its curve ends before",
        "benchmark: convergence: the loss of third did not stay finite; its curve ends before",
    ]


def test_without_a_finite_loss_there_is_no_curve() -> None:
    assert curves_of({"baseline": [LossPoint(1, 1, 0.0, math.nan)]}) == ()


def test_converge_returns_falling_losses_for_every_runner() -> None:
    with open_runner(workflow_recipe().baseline()) as baseline, open_runner(workflow_recipe()) as workflow:
        curves = converge({"baseline": baseline, "workflow": workflow}, num_steps=30, budget=FREE)
    for curve in curves:
        assert curve.steps == tuple(range(1, 31))
        assert curve.loss[-1] < curve.loss[0]
        assert list(curve.tokens) == sorted(curve.tokens)
        assert curve.seconds[0] == 0.0 < curve.seconds[1]
