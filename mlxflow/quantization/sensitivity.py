"""Estimate the loss from quantizing each layer from gradients: one backward pass a row for all settings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxflow.ops.row_slices import slices_of
from mlxflow.quantization.codec import Packed, round_trip, unpack
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.streamed_gradients import GradientRows, visit_gradients

#: The estimated divergence of each layer at each of its candidates, in nats per token.
Costs = dict[str, dict[Setting, float]]

# Numbers of a matrix that are rounded at a time: intermediate results are several times as large
_NUMBERS_AT_ONCE = 1 << 22

# Bytes of codes that are held for the layers of a part; more are read again for each row
_HELD_CODES = 5 << 29

_Add = Callable[[Mapping[str, mx.array]], None]


class Slope(NamedTuple):
    """The derivative of a loss in a factor of a layer's rounding error, at the factor 1, in nats per token.

    Attributes:
        value: mean over the tokens of all rows.
        error: its standard error over the rows; infinite for a single row.
    """

    value: float
    error: float


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
        sums = {path: [mx.array(0.0)] * len(_slices(weight)) for path, weight in weights.items()}

        def add(gradients: Mapping[str, mx.array]) -> None:
            for path, gradient in gradients.items():
                for number, piece in enumerate(_slices(gradient)):
                    sums[path][number] = sums[path][number] + piece.astype(mx.float32).square()
                    mx.eval(sums[path][number])

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
        sizes = sum(packed(path, setting).nbytes for path in weights for setting in candidates[path])
        codes: dict[tuple[str, Setting], Packed] = {}

        def add(gradients: Mapping[str, mx.array]) -> None:
            for path, weight in weights.items():
                for setting in candidates[path]:
                    one = codes.get((path, setting)) or packed(path, setting)
                    if sizes <= _HELD_CODES:
                        codes[path, setting] = one
                    costs[path][setting] += _projected(weight, one, setting, gradients[path]) ** 2

        yield add
        codes.clear()

    return _by_token(costs, visit_gradients(load, list(candidates), rows, part=part))


def error_slopes(
    load: Callable[[], nn.Module],
    dense: Callable[[], nn.Module],
    paths: Sequence[str],
    rows: GradientRows,
) -> dict[str, Slope]:
    """Return for each layer of a quantized model how the loss grows with the size of its rounding error.

    Args:
        load: returns the model with dequantized weights in eval mode, lazy and its own; memory holds one block.
        dense: returns the dense model in the same way.
        paths: of the layers.
        rows: tokens and loss.
    """
    products: dict[str, list[float]] = {path: [] for path in paths}

    @contextmanager
    def part(weights: Mapping[str, mx.array]) -> Iterator[_Add]:
        modules = dict(dense().named_modules())
        exact = {path: modules[path].weight for path in weights}
        modules.clear()

        def add(gradients: Mapping[str, mx.array]) -> None:
            for path, weight in weights.items():
                products[path].append(_along_error(gradients[path], weight, exact[path]))

        yield add
        exact.clear()

    count = max(visit_gradients(load, paths, rows, part=part), 1.0)
    return {path: _slope(np.array([*values]), count) for path, values in products.items()}


def _along_error(gradient: mx.array, weight: mx.array, exact: mx.array) -> float:
    """Return the product of a gradient with the difference of two weights, some rows at a time."""
    total = 0.0
    for by, piece, other in zip(*map(_slices, (gradient, weight, exact)), strict=True):
        total += float((by.astype(mx.float32) * (piece - other)).sum())
    return total


def _slope(products: np.ndarray, count: float) -> Slope:
    """Return the slope from the products of all rows, and the number of tokens in these."""
    number = len(products)
    error = float(products.std(ddof=1)) * number**0.5 / count if number > 1 else np.inf
    return Slope(float(products.sum()) / count, error)


def _projected(weight: mx.array, codes: Packed, setting: Setting, gradient: mx.array) -> float:
    """Return the product of a gradient with the rounding error of a weight, some rows at a time."""
    biases = None if codes.biases is None else _by_rows(codes.biases)
    rows = Packed(_by_rows(codes.weight), _by_rows(codes.scales), biases)
    total, begin = 0.0, 0
    for piece, by in zip(_slices(weight), _slices(gradient), strict=True):
        end = begin + len(piece)
        own = Packed(rows.weight[begin:end], rows.scales[begin:end], None if biases is None else biases[begin:end])
        lost = piece - unpack(own, setting, weight.dtype)
        total += float((by * lost).astype(mx.float32).sum())
        begin = end
    return total


def _by_token(costs: Costs, count: float) -> Costs:
    """Return half of sums over all tokens for one of them."""
    return {
        path: {setting: total / (2 * max(count, 1.0)) for setting, total in options.items()}
        for path, options in costs.items()
    }


def _cost(weight: mx.array, setting: Setting, squares: Sequence[mx.array], dtype: mx.Dtype | None) -> float:
    """Return the sum of squared rounding errors by their weights, some rows at a time."""
    total = 0.0
    for part, by in zip(_slices(weight), squares, strict=True):
        stored = round_trip(part if dtype is None else part.astype(dtype), setting)
        lost = (part.astype(mx.float32) - stored.astype(mx.float32)).square()
        total += float((lost * by).sum())
    return total


def _by_rows(matrix: mx.array) -> mx.array:
    return matrix.reshape(-1, matrix.shape[-1])


def _slices(matrix: mx.array) -> list[mx.array]:
    return slices_of(matrix, _NUMBERS_AT_ONCE)
