"""Estimate the loss from quantizing each layer from squared gradients: one backward pass a row for all settings."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlxflow.quantization.codec import Packed, round_trip, unpack
from mlxflow.quantization.settings import Setting

#: See `training.objective.Objective`: takes a model, tokens and marks, (B, L + 1) each; returns the sum of the losses
#: and the number of targets.
Objective = Callable[[nn.Module, mx.array, mx.array], tuple[mx.array, mx.array]]

#: The estimated divergence of each layer at each of its candidates, in nats per token.
Costs = dict[str, dict[Setting, float]]


def measure_costs(
    model: nn.Module,
    candidates: Mapping[str, Sequence[Setting]],
    tokens: mx.array,
    marks: mx.array,
    *,
    objective: Objective,
    dtype: mx.Dtype | None,
) -> Costs:
    """Return for each layer and candidate an estimate of the divergence from the dense model, in nats per token.

    To second order the divergence is half the squared error of each weight times its Fisher information, estimated by
    the squared gradients of the loss (Dong et al. 2019, arXiv:1905.03696, diagonal only). Costs of layers are additive.

    Args:
        model: dense, in eval mode; unchanged.
        candidates: module path to candidate settings.
        tokens: (R, L + 1) ids.
        marks: (R, L + 1); see `data.token_file.Batch`.
        objective: the loss.
        dtype: of the stored weights, scales and biases; None for the model's.
    """
    squares, count = _mean_squares(model, list(candidates), tokens, marks, objective)
    modules = dict(model.named_modules())
    costs: Costs = {}
    for path, settings in candidates.items():
        weight = modules[path].weight
        stored = weight if dtype is None else weight.astype(dtype)
        losses = [_cost(weight, round_trip(stored, setting), squares.get(path), count) for setting in settings]
        mx.eval(losses)
        costs[path] = {setting: float(loss) for setting, loss in zip(settings, losses, strict=True)}
        squares.pop(path, None)
    return costs


def projected_costs(
    model: nn.Module,
    packed: Mapping[Setting, Mapping[str, Packed]],
    tokens: mx.array,
    marks: mx.array,
    *,
    objective: Objective,
) -> Costs:
    """Return for each layer and setting an estimate of the divergence that some codes cause, in nats per token.

    Half the mean over the rows of the squared product of a row's gradient with the rounding error: the Fisher
    information of the whole layer, so that errors which compensate each other, as a method makes them, cost little.

    Args:
        model: dense, in eval mode; unchanged.
        packed: codes of the layers by setting and module path.
        tokens: (R, L + 1) ids.
        marks: (R, L + 1); see `data.token_file.Batch`.
        objective: the loss.
    """
    modules = dict(model.named_modules())
    weights = {path: modules[path].weight for path in dict.fromkeys(path for some in packed.values() for path in some)}
    sums: dict[tuple[str, Setting], float] = dict.fromkeys(
        ((path, setting) for setting, some in packed.items() for path in some), 0.0
    )
    count = 0.0
    with _gradients(model, weights, objective) as gradients_of:
        for row in range(len(tokens)):
            targets, gradients = gradients_of(tokens[row : row + 1], marks[row : row + 1])
            mx.eval(targets, gradients)
            count += float(targets)
            for setting, some in packed.items():
                found = {
                    path: (gradients[path] * (weights[path] - unpack(codes, setting, weights[path].dtype)))
                    .astype(mx.float32)
                    .sum()
                    for path, codes in some.items()
                }
                mx.eval(found)
                for path, product in found.items():
                    sums[path, setting] += float(product) ** 2
    costs: Costs = {path: {} for path in weights}
    for (path, setting), total in sums.items():
        costs[path][setting] = total / (2 * max(count, 1.0))
    return costs


@contextmanager
def _gradients(
    model: nn.Module, weights: Mapping[str, mx.array], objective: Objective
) -> Iterator[Callable[[mx.array, mx.array], tuple[mx.array, dict[str, mx.array]]]]:
    """Yield a compiled function of rows that returns the number of targets and the gradients of some weights."""
    modules = dict(model.named_modules())

    def loss(weights: dict[str, mx.array], tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        for path, weight in weights.items():
            modules[path].weight = weight
        return objective(model, tokens, marks)

    def gradients(
        weights: dict[str, mx.array], tokens: mx.array, marks: mx.array
    ) -> tuple[mx.array, dict[str, mx.array]]:
        (_, targets), found = mx.value_and_grad(loss)(weights, tokens, marks)
        return targets, found

    compiled = mx.compile(gradients)
    try:
        yield lambda tokens, marks: compiled(dict(weights), tokens, marks)
    finally:
        for path, weight in weights.items():
            modules[path].weight = weight


def _cost(weight: mx.array, stored: mx.array, squares: mx.array | None, count: mx.array) -> mx.array:
    lost = (weight.astype(mx.float32) - stored.astype(mx.float32)).square()
    return (lost * squares).sum() / (2 * count) if squares is not None else mx.array(0.0)


def _mean_squares(
    model: nn.Module, paths: Sequence[str], tokens: mx.array, marks: mx.array, objective: Objective
) -> tuple[dict[str, mx.array], mx.array]:
    """Return the sum over rows of the squared gradient of each weight, in fp32, and the number of targets.

    The gradients of a row's tokens are nearly uncorrelated: the square of their sum is about the sum of their squares.
    """
    modules = dict(model.named_modules())
    weights = {path: modules[path].weight for path in paths}

    def loss(weights: dict[str, mx.array], tokens: mx.array, marks: mx.array) -> tuple[mx.array, mx.array]:
        for path, weight in weights.items():
            modules[path].weight = weight
        return objective(model, tokens, marks)

    def add(
        weights: dict[str, mx.array], sums: dict[str, mx.array], count: mx.array, tokens: mx.array, marks: mx.array
    ) -> tuple[dict[str, mx.array], mx.array]:
        (_, targets), gradients = mx.value_and_grad(loss)(weights, tokens, marks)
        more = {path: total + gradients[path].astype(mx.float32).square() for path, total in sums.items()}
        return more, count + targets

    compiled = mx.compile(add)
    sums = {path: mx.zeros(weight.shape, mx.float32) for path, weight in weights.items()}
    count = mx.array(0.0)
    try:
        for row in range(len(tokens)):
            sums, count = compiled(weights, sums, count, tokens[row : row + 1], marks[row : row + 1])
            mx.eval(sums, count)
    finally:
        for path, weight in weights.items():
            modules[path].weight = weight
    return sums, mx.maximum(count, 1.0)
