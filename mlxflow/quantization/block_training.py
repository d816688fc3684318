"""Train the rounding and the grids of one block so that it gives the outputs of the dense block.

Cheng et al. 2023 (SignRound, arXiv:2309.05516) and Chen et al. 2024 (Block-AP of EfficientQAT, arXiv:2407.11062): the
block gets the hidden states that the quantized blocks before it give, and its target are those of the dense model, so
it corrects their errors as well. The error of a token is relative to the size of its hidden state: norms remove the
size, and a few tokens have states that are thousands of times larger.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlxflow.quantization.trained_grid import GridLayer, Trained

# Adam's averages: short, since a block has few steps
_BETAS, _EPSILON = (0.9, 0.95), 1e-12

# Highest step of a position in units of the grid, and of a relative change of a scale or a bias
_RATES = {"positions": 0.012, "stretch": 3e-3, "shift": 3e-3}

# Arrays of the layers of a block, and Adam's averages of their gradients and of the squares of these
_State = tuple[dict[str, Trained], ...]


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
        first_error: mean relative squared error of the outputs in the first steps.
        last_error: in the last steps.
    """

    trained: dict[str, Trained]
    first_error: float
    last_error: float


def relative_error(outputs: mx.array, targets: mx.array) -> mx.array:
    """Return the squared error of each token by the square of its target, mean over the tokens, in fp32."""
    outputs, targets = outputs.astype(mx.float32), targets.astype(mx.float32)
    sizes = mx.maximum(targets.square().sum(axis=-1), 1e-12)
    return ((outputs - targets).square().sum(axis=-1) / sizes).mean()


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
        block: a block of a model; the weights of its layers are replaced meanwhile, and left rounded.
        call: runs it on hidden states.
        layers: the fixed side of its quantized layers, by path within the block.
        trained: their arrays to train; emptied.
        rows: inputs and targets.
        num_steps: updates.
        batch_size: rows in an update.
        seed: of the order of the rows.
    """
    modules = dict(block.named_modules())

    def loss(trained: dict[str, Trained], x: mx.array, y: mx.array) -> mx.array:
        for path, layer in layers.items():
            modules[path].weight = layer.weight(trained[path])
        return relative_error(call(block, x), y)

    def step(state: _State, x: mx.array, y: mx.array, number: mx.array) -> tuple[mx.array, _State]:
        error, gradients = mx.value_and_grad(loss)(state[0], x, y)
        return error, _adam(layers, state, gradients, number, num_steps)

    dense = {path: modules[path].weight for path in layers}
    state: _State = (dict(trained), *(tree_map(mx.zeros_like, dict(trained)) for _ in range(2)))
    trained.clear()
    compiled = mx.compile(step)
    errors: list[float] = []
    order = _order(rows.num_rows, batch_size, num_steps, seed)
    for number in range(num_steps):
        x, y = rows.read(order[number])
        error, state = compiled(state, x, y, mx.array(float(number)))
        mx.eval(error, state)
        errors.append(float(error))
    for path, weight in dense.items():
        modules[path].weight = weight  # not a lazy one of the traced step
    few = max(1, num_steps // 8)
    return TrainedBlock(state[0], float(np.mean(errors[:few] or [0.0])), float(np.mean(errors[-few:] or [0.0])))


def _adam(
    layers: Mapping[str, GridLayer],
    state: _State,
    gradients: dict[str, Trained],
    number: mx.array,
    num_steps: int,
) -> _State:
    """Return updated arrays and averages (Kingma and Ba 2014, arXiv:1412.6980), with a rate that falls to zero."""
    arrays, means, squares = state
    first, second = _BETAS
    means = tree_map(lambda mean, gradient: first * mean + (1 - first) * gradient, means, gradients)
    squares = tree_map(lambda square, one: second * square + (1 - second) * one * one, squares, gradients)
    left = 1 - number / num_steps
    scale, root = 1 / (1 - first ** (number + 1)), 1 / (1 - second ** (number + 1))

    def rate(path: str, name: str) -> mx.array:
        return left * scale * _RATES[name] * (layers[path].spacing if name == "positions" else 1.0)

    moved = {
        path: {
            name: array - rate(path, name) * means[path][name] / (mx.sqrt(squares[path][name] * root) + _EPSILON)
            for name, array in own.items()
        }
        for path, own in arrays.items()
    }
    return moved, means, squares


def _order(num_rows: int, batch_size: int, num_steps: int, seed: int) -> list[np.ndarray]:
    """Return the rows of each step: each row as often as any other, in a random order."""
    random = np.random.default_rng(seed)
    passes = max(1, -(-num_steps * batch_size // num_rows))
    order = np.concatenate([random.permutation(num_rows) for _ in range(passes)])
    return [order[number * batch_size : (number + 1) * batch_size] for number in range(num_steps)]
