"""Train the scales and biases of a whole quantized model to give the dense model's distributions.

The second phase of EfficientQAT (Chen et al. 2024, arXiv:2407.11062): codes stay as they are, and so does the size of
the file. It starts from the grids that the blocks learned one by one.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map, tree_unflatten
from numpy.typing import NDArray

from mlxflow.ops import document_mask
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.distillation import losses_of_hidden
from mlxflow.quantization.grid_training import rate_shares
from mlxflow.quantization.mlx_lm_patches import dense_products, recomputing_blocks
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.teacher_logits import TeacherLogits, distillation_losses
from mlxflow.quantization.tuning_saves import TuningSaves
from mlxflow.training.output_head import find_head

# Adam's averages: short, since there are few steps
_BETAS, _EPSILON = (0.9, 0.95), 1e-12

# Highest step of a scale, and of a bias, relative to the mean size of the scales of its layer; see also `rate_shares`
_RATE = 2e-3

# Scales and biases by name, and Adam's averages of their gradients and of the squares of these
_TuningState = tuple[dict[str, mx.array], ...]

# Its parts in a file
_PARTS = ("scales", "means", "squares")


class TunedScales(NamedTuple):
    """The result: codes by module path, the number of steps, and the losses in nats in the first and last of them."""

    packed: dict[str, Packed]
    num_steps: int
    first_loss: float
    last_loss: float


def tune_scales(
    student: nn.Module,
    plan: Mapping[str, Setting],
    tokens: NDArray[Any],
    teacher: TeacherLogits,
    *,
    num_steps: int,
    batch_size: int,
    seed: int,
    saves: TuningSaves,
) -> TunedScales:
    """Return the packed layers of a quantized model with trained scales and biases.

    Layers with a fixed zero point, and those of modes without biases, keep theirs.

    Args:
        student: quantized, in eval mode; changed.
        plan: module path to setting.
        tokens: (R, L) ids.
        teacher: the dense model's distributions on these.
        num_steps: updates.
        batch_size: rows in an update.
        seed: of the order of the rows.
        saves: of the state; the tuning continues from that of an interrupted run.
    """
    grids = _Grids(student, plan, int(tokens.max()) + 1)

    def step(state: _TuningState, batch: tuple[mx.array, ...], number: mx.array) -> tuple[mx.array, _TuningState]:
        arrays, means, squares = state
        value, gradients = mx.value_and_grad(grids.loss)(arrays, *batch)
        first, second = _BETAS
        means = tree_map(lambda mean, one: first * mean + (1 - first) * one, means, gradients)
        squares = tree_map(lambda square, one: second * square + (1 - second) * one * one, squares, gradients)
        left = _RATE * (1 - number / num_steps) / (1 - first ** (number + 1))
        root = 1 / (1 - second ** (number + 1))
        moved = {
            name: array - left * grids.units[name] * means[name] / (mx.sqrt(squares[name] * root) + _EPSILON)
            for name, array in arrays.items()
        }
        return value, (moved, means, squares)

    zeros = {name: mx.zeros_like(value) for name, value in grids.begin.items()}
    state: _TuningState = (dict(grids.begin), zeros, dict(zeros))
    losses: list[float] = []
    if saves.begun is not None:
        state, losses = _unflattened(saves.begun.arrays), saves.begun.losses
    order = _order(len(tokens), batch_size, num_steps, seed)
    with dense_products(student), recomputing_blocks(student), saves.saving_on_signals():
        compiled = mx.compile(step)
        for number, rows in enumerate(order[saves.first :], saves.first):
            batch = (mx.array(tokens[rows].astype(np.int32)), *teacher.of(rows))
            saves.forget()
            value, state = compiled(state, batch, mx.array(float(number)))
            mx.eval(value, state)
            losses.append(float(value))
            saves.note(number + 1, partial(_flattened, state), losses)
    grids.put(state[0])
    mx.eval(student.parameters())
    few = max(1, num_steps // 8)
    return TunedScales(grids.packed(), num_steps, float(np.mean(losses[:few])), float(np.mean(losses[-few:])))


def _flattened(state: _TuningState) -> dict[str, mx.array]:
    """Return the arrays of a state by a name each."""
    parts = zip(_PARTS, state, strict=True)
    return {f"{part}.{name}": value for part, arrays in parts for name, value in arrays.items()}


def _unflattened(arrays: Mapping[str, mx.array]) -> _TuningState:
    return tuple(
        {name.removeprefix(f"{part}."): value for name, value in arrays.items() if name.startswith(f"{part}.")}
        for part in _PARTS
    )


class _Grids:
    """The scales and biases of a quantized model that are trained: `begin`, and the `units` of their steps, by name."""

    def __init__(self, student: nn.Module, plan: Mapping[str, Setting], vocab_size: int) -> None:
        self._student, self._plan = student, plan
        self._modules = dict(student.named_modules())
        self._head = find_head(student, vocab_size)
        student.freeze()  # a recomputed block has gradients of what is trained alone
        self.begin: dict[str, mx.array] = {}
        self.units: dict[str, mx.array] = {}
        self._dtypes: dict[str, mx.Dtype] = {}
        shares = rate_shares(student, plan)
        for path in (path for path, setting in plan.items() if setting.mode == "affine"):
            layer = self._modules[path]
            layer.unfreeze(keys=["scales", "biases"], recurse=False)
            unit = shares[path] * mx.abs(layer.scales.astype(mx.float32)).mean()
            for own in ("scales", "biases"):
                self._dtypes[f"{path}.{own}"] = layer[own].dtype
                self.begin[f"{path}.{own}"] = layer[own].astype(mx.float32)
                self.units[f"{path}.{own}"] = unit
        mx.eval(self.begin, self.units)

    def put(self, arrays: Mapping[str, mx.array]) -> None:
        """Give the model other scales and biases, in their stored dtype."""
        stored = [(name, array.astype(self._dtypes[name])) for name, array in arrays.items()]
        self._student.update(tree_unflatten(stored))

    def loss(self, arrays: dict[str, mx.array], x: mx.array, *teacher: mx.array) -> mx.array:
        """Return the distillation loss of the model with some scales and biases."""
        self.put(arrays)
        if self._head is not None:
            hidden = document_mask.apply_body(self._student, x, None)
            return losses_of_hidden(self._student, self._head, hidden, teacher, mx.ones(x.shape)) / x.size
        return distillation_losses(self._student(x), *teacher).mean()

    def packed(self) -> dict[str, Packed]:
        """Return the packed layers of the plan."""
        layers = {path: self._modules[path] for path in self._plan}
        return {path: Packed(layer.weight, layer.scales, layer.get("biases")) for path, layer in layers.items()}


def _order(num_rows: int, batch_size: int, num_steps: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the rows of each step, in increasing numbers: each row as often as any other."""
    random = np.random.default_rng(seed)
    passes = max(1, -(-num_steps * batch_size // num_rows))
    order = np.concatenate([random.permutation(num_rows) for _ in range(passes)])
    return [np.sort(order[number * batch_size : (number + 1) * batch_size]) for number in range(num_steps)]
