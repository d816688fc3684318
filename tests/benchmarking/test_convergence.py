from mlxflow.benchmarking.convergence import converge, with_same_loss
from tests.benchmarking.small_steps import open_runner, workflow_recipe
from tests.small_models import FREE


def test_curves_have_the_tokens_and_seconds_to_the_loss_that_all_reached() -> None:
    curves = [
        {"name": "baseline", "tokens": [1, 2, 3], "seconds": [0.0, 5.0, 9.0], "loss": [4.0, 3.0, 2.5]},
        {"name": "workflow", "tokens": [1, 2, 3], "seconds": [0.0, 2.0, 4.0], "loss": [4.0, 2.4, 2.0]},
    ]
    found = with_same_loss(curves)
    assert [(one["same_loss"], one["tokens_to_loss"], one["seconds_to_loss"]) for one in found] == [
        (2.5, 3, 9.0),
        (2.5, 2, 2.0),
    ]


def test_converge_returns_falling_losses_for_every_runner() -> None:
    with open_runner(workflow_recipe().baseline()) as baseline, open_runner(workflow_recipe()) as workflow:
        curves = converge({"baseline": baseline, "workflow": workflow}, num_steps=30, budget=FREE)
    for curve in curves:
        assert curve["steps"] == list(range(1, 31))
        assert curve["loss"][-1] < curve["loss"][0]
        assert curve["tokens"] == sorted(curve["tokens"])
        assert curve["seconds"][0] == 0.0 < curve["seconds"][1]
