from mlxflow.benchmarking.convergence import LossPoint, converge, curves_of
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


def test_converge_returns_falling_losses_for_every_runner() -> None:
    with open_runner(workflow_recipe().baseline()) as baseline, open_runner(workflow_recipe()) as workflow:
        curves = converge({"baseline": baseline, "workflow": workflow}, num_steps=30, budget=FREE)
    for curve in curves:
        assert curve.steps == tuple(range(1, 31))
        assert curve.loss[-1] < curve.loss[0]
        assert list(curve.tokens) == sorted(curve.tokens)
        assert curve.seconds[0] == 0.0 < curve.seconds[1]
