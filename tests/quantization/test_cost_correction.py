import math
from typing import Any

import numpy as np
import pytest

from mlxflow.quantization.cost_correction import Observation, corrected_costs
from mlxflow.quantization.sensitivity import Costs, Slope
from mlxflow.quantization.settings import Setting

TWO, THREE, FOUR = (Setting("affine", bits, 64) for bits in (2, 3, 4))
PATHS = ["embed_tokens", *(f"layers.{block}.{kind}" for block in range(6) for kind in ("q_proj", "up_proj"))]
COSTS: Costs = {
    path: {TWO: 4.0 * (number + 1), THREE: number + 1.0, FOUR: 0.2 * (number + 1)} for number, path in enumerate(PATHS)
}


def _observation(plan: dict[str, Setting], factor: Any, *, noise: float = 0.0, error: float = 0.01) -> Observation:
    """Return slopes of layers whose costs are those estimated, each times a factor."""
    random = np.random.default_rng(0)
    slopes = {}
    for path, setting in plan.items():
        exact = 2 * COSTS[path][setting]
        value = exact * (factor(path, setting) + noise * float(random.normal()))
        slopes[path] = Slope(value, exact * max(error, noise))
    return Observation(plan, slopes)


def _factors(costs: Costs) -> dict[tuple[str, Setting], float]:
    return {(path, one): cost / COSTS[path][one] for path, options in costs.items() for one, cost in options.items()}


def test_costs_become_those_that_slopes_show() -> None:
    def factor(path: str, _: Setting) -> float:
        return 3.0 if path == "layers.2.up_proj" else 2.0 if "up_proj" in path else 1.0

    found = _factors(corrected_costs(COSTS, [_observation(dict.fromkeys(PATHS, THREE), factor)]))
    for path in PATHS:
        assert found[path, THREE] == pytest.approx(factor(path, THREE), abs=0.3)
    assert found["layers.2.up_proj", THREE] > found["layers.3.up_proj", THREE] + 0.3
    assert found["layers.2.up_proj", TWO] > 1.8  # and the other settings of such a layer


def test_what_a_setting_of_a_kind_costs_is_shared_by_its_layers() -> None:
    def factor(path: str, setting: Setting) -> float:
        return 2.5 if "q_proj" in path and setting == TWO else 1.0

    mixed = {path: TWO if path[-8:] in ("0.q_proj", "4.q_proj", "4.up_proj") else THREE for path in PATHS}
    seen = [_observation(plan, factor) for plan in (dict.fromkeys(PATHS, THREE), mixed)]
    found = _factors(corrected_costs(COSTS, seen))
    assert found["layers.2.q_proj", TWO] > 1.4 * found["layers.2.up_proj", TWO]  # both were never seen at 2 bits
    assert found["layers.2.q_proj", THREE] == pytest.approx(1, abs=0.1)
    assert found["layers.0.q_proj", TWO] == pytest.approx(2.5, abs=0.2)


def test_a_setting_without_a_slope_costs_what_it_may_be_in_the_mean() -> None:
    found = _factors(corrected_costs(COSTS, [_observation(dict.fromkeys(PATHS, THREE), lambda *_: 1.0)]))
    assert all(found[path, THREE] == pytest.approx(1, abs=0.05) for path in PATHS)
    assert all(1.05 < found[path, TWO] < 1.4 for path in PATHS)


def test_noisy_slopes_change_costs_less() -> None:
    plan = dict.fromkeys(PATHS, THREE)

    def factor(path: str, _: Setting) -> float:
        return 3.0 if path == "layers.2.up_proj" else 1.0

    exact, noisy = (
        _factors(corrected_costs(COSTS, [_observation(plan, factor, error=error)])) for error in (0.01, 3.0)
    )
    assert exact["layers.2.up_proj", THREE] > 2 * exact["layers.3.up_proj", THREE]
    assert 1 < noisy["layers.2.up_proj", THREE] / noisy["layers.3.up_proj", THREE] < 1.3


def test_slopes_that_are_not_numbers_or_below_zero_change_nothing() -> None:
    plan = dict.fromkeys(PATHS, THREE)
    odd = [Slope(5.0, math.inf), Slope(math.nan, 0.1), Slope(-100.0, 0.001)]
    assert corrected_costs(COSTS, [Observation(plan, dict.fromkeys(PATHS, slope)) for slope in odd]) == COSTS
    exact = _observation(plan, lambda *_: 1.0)
    nothing: Costs = {path: dict.fromkeys(options, 0.0) for path, options in COSTS.items()}
    assert corrected_costs(nothing, [exact]) == nothing
    assert corrected_costs(COSTS, []) == COSTS


def test_a_slope_of_chance_makes_no_layer_free() -> None:
    plan = dict.fromkeys(PATHS, THREE)
    exact = _observation(plan, lambda *_: 1.0)
    negative = exact._replace(slopes={**exact.slopes, "layers.2.up_proj": Slope(-1.0, 0.001)})
    found = _factors(corrected_costs(COSTS, [negative]))
    assert 0.09 < found["layers.2.up_proj", THREE] < 0.3
