"""Train the rounding and the grids of one block so that it gives the outputs of the dense block.

Cheng et al. 2023 (SignRound, arXiv:2309.05516) and Chen et al. 2024 (Block-AP of EfficientQAT, arXiv:2407.11062): the
block gets the hidden states that the quantized blocks before it give, and its target are those of the dense model, so
it corrects their errors as well. The error of a token is relative to the size of its hidden state: norms remove the
size, and a few tokens have states that are thousands of times larger. So have a few dimensions ("massive activations",
Sun et al. 2024, arXiv:2402.17762), which would be nearly all of the error: these count by their own size.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlxflow.quantization.trained_grid import GridLayer, Trained

# Adam's averages: short, since a block has few steps
_BETAS, _EPSILON = (0.9, 0.95), 1e-12

# Square of a hidden state, or a dimension of one, that is taken for zero
_LEAST_SIZE = 1e-12

# Medians of the mean squares of all dimensions that are added to that of each: dimensions of usual size count alike.
# With 1 instead of 8 Gemma 3 270M lost less at 4 bits, SmolLM2 more
_USUAL_SIZES = 8

# Highest step of a position in units of the grid, and of a relative change of a scale or a bias
_RATES = {"positions": 0.012, "stretch": 3e-3, "shift": 3e-3}


class BlockRows(NamedTuple):
    """Rows of hidden states, read some at a time.

    Attributes:
        num_rows: R.
        read: returns inputs and targets of the rows of some numbers, (B, L, D) each.
    """

    num_rows: int
    read: Callable[[np.ndarray], tuple[mx.array, mx.array]]


class TrainedBlock(NamedTuple):
    """The result of a block's training.

    Attributes:
        trained: arrays by path of a layer within the block.
        first_error: mean `relative_error` of the outputs in the first steps.
        last_error: in the last steps.
    """

    trained: dict[str, Trained]
    first_error: float
    last_error: float


def relative_error(outputs: mx.array, targets: mx.array) -> mx.array:
    """Return the squared error of each token by the square of its target, mean over the tokens, in fp32.

    Each dimension is weighted by the inverse of its mean square over the tokens, to which eight times the median of all
    is added: only dimensions far larger than others count less. Outputs that are wrong by one factor, such as 1.1, have
    the same error as without weights, 0.01.

    Args:
        outputs: (B, L, D).
        targets: (B, L, D).
    """
    outputs, targets = outputs.astype(mx.float32), targets.astype(mx.float32)
    sizes = mx.maximum(targets.square().mean(axis=-1, keepdims=True), _LEAST_SIZE)
    of_dimensions = (targets.square() / sizes).reshape(-1, targets.shape[-1]).mean(axis=0)
    weights = 1 / mx.maximum(of_dimensions + _USUAL_SIZES * mx.median(of_dimensions), _LEAST_SIZE)
    weights = weights / mx.maximum((weights * of_dimensions).sum(), _LEAST_SIZE)
    return ((outputs - targets).square() / sizes * weights).sum(axis=-1).mean()


def train_block(
    block: nn.Module,
    call: Callable[[nn.Module, mx.array], mx.array],
    layers: Mapping[str, GridLayer],
    trained: dict[str, Trained],
    rows: BlockRows,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
) -> TrainedBlock:
    """Train the arrays of a block's layers by Adam, with steps that shrink to zero.

    Args:
        block: a block of a model; the weights of its layers are not used, and left as zeros that are not evaluated.
        call: runs it on hidden states.
        layers: the fixed side of its quantized layers, by path within the block.
        trained: their arrays to train; emptied.
        rows: inputs and targets.
        num_steps: updates.
        batch_size: rows in an update.
        seed: of the order of the rows.
    """
    modules = dict(block.named_modules())
    shapes = {path: (modules[path].weight.shape, modules[path].weight.dtype) for path in layers}

    def loss(arrays: dict[str, Trained], x: mx.array, y: mx.array) -> mx.array:
        for path, layer in layers.items():
            modules[path].weight = layer.weight(arrays[path])
        return relative_error(call(block, x), y)

    def release() -> None:
        for path, shape in shapes.items():
            modules[path].weight = mx.zeros(*shape)  # not evaluated; nor the dense one, nor one of the traced step

    release()
    arrays = dict(trained)
    trained.clear()
    averages = {path: [tree_map(mx.zeros_like, own) for _ in range(2)] for path, own in arrays.items()}
    gradients_of: Callable[..., Any] = mx.compile(mx.value_and_grad(loss))
    moved: Callable[..., Any] = mx.compile(_moved)
    errors: list[float] = []
    order = _order(rows.num_rows, batch_size, num_steps, seed)
    for number in range(num_steps):
        error, gradients = gradients_of(arrays, *rows.read(order[number]))
        mx.eval(error, gradients)
        errors.append(float(error))
        steps = _step_sizes(number, num_steps)
        for path, layer in layers.items():  # one at a time: while it moves, a layer is held twice
            own = {name: step * (layer.spacing if name == "positions" else 1.0) for name, step in steps.items()}
            arrays[path], *averages[path] = moved(
                arrays[path], *averages[path], gradients.pop(path), own, _root(number)
            )
            mx.eval(arrays[path], averages[path])
    release()
    few = max(1, num_steps // 8)
    return TrainedBlock(arrays, float(np.mean(errors[:few] or [0.0])), float(np.mean(errors[-few:] or [0.0])))


def _step_sizes(number: int, num_steps: int) -> dict[str, mx.array]:
    """Return Adam's step sizes by name of an array: they fall to zero (Kingma and Ba 2014, arXiv:1412.6980)."""
    factor = (1 - number / num_steps) / (1 - _BETAS[0] ** (number + 1))
    return {name: mx.array(factor * rate) for name, rate in _RATES.items()}


def _root(number: int) -> mx.array:
    """Return the factor that corrects the average of squares after few steps."""
    return mx.array(1 / (1 - _BETAS[1] ** (number + 1)))


def _moved(
    arrays: Trained, means: Trained, squares: Trained, gradients: Trained, steps: dict[str, mx.array], root: mx.array
) -> tuple[Trained, Trained, Trained]:
    """Return updated arrays of a layer, and Adam's averages of their gradients and of the squares of these."""
    first, second = _BETAS
    means = tree_map(lambda mean, gradient: first * mean + (1 - first) * gradient, means, gradients)
    squares = tree_map(lambda square, one: second * square + (1 - second) * one * one, squares, gradients)
    new = {
        name: array - steps[name] * means[name] / (mx.sqrt(squares[name] * root) + _EPSILON)
        for name, array in arrays.items()
    }
    return new, means, squares


def _order(num_rows: int, batch_size: int, num_steps: int, seed: int) -> list[np.ndarray]:
    """Return the rows of each step: each row as often as any other, in a random order."""
    random = np.random.default_rng(seed)
    passes = max(1, -(-num_steps * batch_size // num_rows))
    order = np.concatenate([random.permutation(num_rows) for _ in range(passes)])
    return [order[number * batch_size : (number + 1) * batch_size] for number in range(num_steps)]
