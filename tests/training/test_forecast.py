import pytest

from mlxflow.training.forecast import _at, _peak
from mlxflow.training.step_trials import StepTrial


def test_a_pass_is_linear_in_its_tokens_and_never_below_a_trial() -> None:
    assert _at(400, 100, 10.0, 200, 15.0) == pytest.approx(25.0)
    assert _at(400, 100, 10.0, 200, 9.0) == 9.0
    assert _at(400, 100, 10.0, 100, 10.0) == pytest.approx(40.0)


def test_the_peak_of_the_update_does_not_grow_with_the_tokens() -> None:
    few, many = StepTrial(100, 90, 30, 1.0, 0.1), StepTrial(200, 90, 40, 2.0, 0.1)
    assert _peak(few, many, 400) == 90
    assert _peak(few, many, 4000) == pytest.approx(420)
