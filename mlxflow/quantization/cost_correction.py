"""Correct estimated costs of layers by slopes that were measured at quantized models.

Costs are estimated from gradients at the dense model. A plan of few bits is far from it, where some kinds of layers
cost more than estimated, and others less. The loss at a plan has a slope along the rounding error of each layer: about
twice the cost of that layer, since costs grow with the square of the error. Slopes are noisy, and each plan shows
one setting of a layer, so what they say is shared among layers of a kind, of a depth and with the same bits.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlxflow.quantization.sensitivity import Costs, Slope
from mlxflow.quantization.settings import Setting

# Prior variances of the effects on the logarithm of measured by estimated costs: one for all layers, of groups of
# layers, of each layer, of each layer at some bits
_OF_ALL, _OF_GROUPS, _OF_LAYER, _OF_BITS = 1.0, 0.1, 0.15, 0.15

# Variance that the effects leave unexplained, besides the noise of a slope
_UNEXPLAINED = 0.02

# Part of what all layers have that a layer has at least: a slope of chance must not make it free
_LEAST_PART = 0.1

# Parts of the depth whose layers share an effect
_DEPTHS = 3


class Observation(NamedTuple):
    """Slopes at a quantized model.

    Attributes:
        plan: module path to setting.
        slopes: along the rounding errors of layers, by path.
    """

    plan: Mapping[str, Setting]
    slopes: Mapping[str, Slope]


def corrected_costs(costs: Costs, observations: Sequence[Observation]) -> Costs:
    """Return costs by what slopes show: each times a factor near what was measured by what was estimated.

    The logarithm of a factor is a sum of effects: of all layers, of a kind of layers (the last part of their path), of
    a kind at some bits, of a kind in a third of the depth, of the layer, and of the layer at some bits. The effects are
    fitted by ridge regression, in which slopes with large errors count little. A factor is the mean of what is likely:
    settings without a known slope cost more, so that plans stay near those that were measured.

    Args:
        costs: estimated, of each layer at each candidate.
        observations: at measured plans; costs that are not positive and slopes that are not finite are left out.
    """
    effects = _Effects(costs)
    for observed in observations:
        for path, factor, error in _measured_factors(costs, observed):
            effects.observe(path, observed.plan[path], factor, error)
    if not effects.are_observed:
        return costs
    factor_of = effects.factors()
    return {
        path: {setting: cost * factor_of(path, setting) for setting, cost in options.items()}
        for path, options in costs.items()
    }


def _measured_factors(costs: Costs, observed: Observation) -> Iterator[tuple[str, float, float]]:
    """Yield paths, what was measured by what was estimated, and its standard error.

    What is negative or small by chance becomes its error or a small part of what all layers have; a plan at which they
    have nothing together yields nothing.
    """
    known = {
        path: (slope.value / 2, slope.error / 2, costs[path][observed.plan[path]])
        for path, slope in observed.slopes.items()
        if np.isfinite(slope.value) and np.isfinite(slope.error) and costs[path][observed.plan[path]] > 0
    }
    usual = sum(value for value, _, _ in known.values()) / max(sum(cost for *_, cost in known.values()), 1e-30)
    if usual <= 0:
        return
    for path, (value, error, cost) in known.items():
        least = min(max(error / cost, _LEAST_PART * usual), usual)
        yield path, max(value / cost, least), error / cost


class _Effects:
    """The effects on the costs of some layers, normally distributed: their places in a vector, precisions and mean."""

    def __init__(self, costs: Costs) -> None:
        self._blocks = 1 + max((_block_of(path) for path in costs), default=0)
        names = {
            name: variance
            for path, options in costs.items()
            for one in options
            for name, variance in self._names(path, one)
        }
        self._places = {name: place for place, name in enumerate(names)}
        self._precision = np.diag(1 / np.array(list(names.values())))
        self._right = np.zeros(len(names))
        self.are_observed = False

    def _names(self, path: str, setting: Setting) -> Iterator[tuple[Hashable, float]]:
        """Yield the effects on a cost, each with its prior variance."""
        kind, block = path.rpartition(".")[2], _block_of(path)
        yield "all", _OF_ALL
        yield ("kind", kind), _OF_GROUPS
        yield ("bits of kind", kind, setting.bits), _OF_GROUPS
        if block >= 0:
            yield ("depth of kind", kind, _DEPTHS * block // self._blocks), _OF_GROUPS
        yield ("layer", path), _OF_LAYER
        yield ("bits", path, setting.bits), _OF_BITS

    def _of(self, path: str, setting: Setting) -> list[int]:
        """Return the places of the effects on a cost."""
        return [self._places[name] for name, _ in self._names(path, setting)]

    def observe(self, path: str, setting: Setting, factor: float, error: float) -> None:
        """Add what was measured by what was estimated, which is positive, and its standard error."""
        variance = (error / factor) ** 2 + _UNEXPLAINED
        places = self._of(path, setting)
        self._precision[np.ix_(places, places)] += 1 / variance
        self._right[places] += np.log(factor) / variance
        self.are_observed = True

    def factors(self) -> Callable[[str, Setting], float]:
        """Return a function that gives the mean factor of a cost, by path and setting."""
        covariance = np.linalg.inv(self._precision)
        likeliest = covariance @ self._right

        def factor(path: str, setting: Setting) -> float:
            places = self._of(path, setting)
            variance = covariance[np.ix_(places, places)].sum()
            return float(np.exp(likeliest[places].sum() + variance / 2))

        return factor


def _block_of(path: str) -> int:
    """Return the first number in a path; -1 if there is none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)
