"""Estimate the loss from quantizing each layer from gradients: one backward pass a row for all settings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlxflow.quantization.codec import Packed, round_trip, unpack
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.streamed_gradients import GradientRows, visit_gradients

#: The estimated divergence of each layer at each of its candidates, in nats per token.
Costs = dict[str, dict[Setting, float]]

# Numbers of a matrix that are rounded at a time: intermediate results are several times as large
_NUMBERS_AT_ONCE = 1 << 24

_Add = Callable[[Mapping[str, mx.array]], None]


def measure_costs(
    load: Callable[[], nn.Module],
    candidates: Mapping[str, Sequence[Setting]],
    rows: GradientRows,
    *,
    dtype: mx.Dtype | None,
) -> Costs:
    """Return for each layer and candidate an estimate of the divergence from the dense model, in nats per token.

    To second order the divergence is half the squared error of each weight times its Fisher information, estimated by
    the squared gradients of the loss (Dong et al. 2019, arXiv:1905.03696, diagonal only): the gradients of a row's
    tokens are nearly uncorrelated, so that the square of their sum is about the sum of their squares. Costs of layers
    are additive.

    Args:
        load: returns the dense model in eval mode, with lazy weights of its own; memory holds one block.
        candidates: module path to candidate settings.
        rows: tokens and loss.
        dtype: of the stored weights, scales and biases; None for the model's.
    """
    costs: Costs = {path: {} for path in candidates}

    @contextmanager
    def part(weights: Mapping[str, mx.array]) -> Iterator[_Add]:
        sums = {path: mx.zeros(weight.shape, mx.float32) for path, weight in weights.items()}

        def add(gradients: Mapping[str, mx.array]) -> None:
            for path, gradient in gradients.items():
                sums[path] = sums[path] + gradient.astype(mx.float32).square()
                mx.eval(sums[path])

        yield add
        for path, weight in weights.items():
            squares = sums.pop(path)
            costs[path] = {setting: _cost(weight, setting, squares, dtype) for setting in candidates[path]}

    return _by_token(costs, visit_gradients(load, list(candidates), rows, part=part))


def projected_costs(
    load: Callable[[], nn.Module],
    candidates: Mapping[str, Sequence[Setting]],
    packed: Callable[[str, Setting], Packed],
    rows: GradientRows,
) -> Costs:
    """Return for each layer and setting an estimate of the divergence that some codes cause, in nats per token.

    Half the mean over the rows of the squared product of a row's gradient with the rounding error: the Fisher
    information of the whole layer, so that errors which compensate each other, as a method makes them, cost little.

    Args:
        load: see `measure_costs`.
        candidates: module path to settings.
        packed: returns the codes of a layer at a setting; called once for each.
        rows: tokens and loss.
    """
    costs: Costs = {path: dict.fromkeys(settings, 0.0) for path, settings in candidates.items()}

    @contextmanager
    def part(weights: Mapping[str, mx.array]) -> Iterator[_Add]:
        codes = {path: {setting: packed(path, setting) for setting in candidates[path]} for path in weights}

        def add(gradients: Mapping[str, mx.array]) -> None:
            for path, weight in weights.items():
                for setting, one in codes[path].items():
                    lost = weight - unpack(one, setting, weight.dtype)
                    product = (gradients[path] * lost).astype(mx.float32).sum()
                    costs[path][setting] += float(product) ** 2

        yield add
        codes.clear()

    return _by_token(costs, visit_gradients(load, list(candidates), rows, part=part))


def _by_token(costs: Costs, count: float) -> Costs:
    """Return half of sums over all tokens for one of them."""
    return {
        path: {setting: total / (2 * max(count, 1.0)) for setting, total in options.items()}
        for path, options in costs.items()
    }


def _cost(weight: mx.array, setting: Setting, squares: mx.array, dtype: mx.Dtype | None) -> float:
    """Return the sum of squared rounding errors by their weights, some rows at a time."""
    width, total = weight.shape[-1], 0.0
    rows, by = weight.reshape(-1, width), squares.reshape(-1, width)
    step = max(1, _NUMBERS_AT_ONCE // width)
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        stored = round_trip(part if dtype is None else part.astype(dtype), setting)
        lost = (part.astype(mx.float32) - stored.astype(mx.float32)).square()
        total += float((lost * by[begin : begin + step]).sum())
    return total
