"""mlx-lm's DWQ with the state of an interrupted run: its function begins with the steps that are left.

It takes the dense model's logits and the optimizer as arguments and trains what the model holds. So a continued run
gives it a model with the scales so far, an optimizer with its averages, and the batches after those that are done.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxflow.ops import patching
from mlxflow.quantization.mlx_lm_patches import quiet
from mlxflow.quantization.tuning_saves import TuningSaves, TuningState

_TRAINED, _AVERAGES = "trained.", "optimizer."


def train(
    student: nn.Module,
    logits: Callable[[mx.array], mx.array],
    rows: Sequence[tuple[list[int], int]],
    *,
    batch_size: int,
    learning_rate: float,
    seed: int,
    dtype: mx.Dtype,
    saves: TuningSaves,
) -> None:
    """Train scales and biases of a quantized model by mlx-lm's function, in place.

    Args:
        student: frozen.
        logits: returns those of the dense model for token ids, (B, L).
        rows: ids with an offset of 0; those of the last batch are for validation.
        batch_size: rows in a step.
        learning_rate: of Adam.
        seed: of the order of the rows.
        dtype: of the scales and biases.
        saves: of the state.
    """
    from mlx_lm.quant import dwq

    training, validation = rows[:-batch_size], rows[-batch_size:]
    optimizer = _SavingAdam(learning_rate, saves)
    if saves.begun is not None:
        _restore(student, optimizer, saves.begun)
    if saves.first >= len(training) // batch_size:
        student.update(tree_map(lambda value: value.astype(dtype), _trained(saves.begun)))
        return

    def targets(batch: mx.array, _: int, split: str) -> mx.array:
        optimizer.note()
        return logits(batch)

    with without_first_batches(training, saves.first), saves.saving_on_signals(), quiet():
        dwq.dwq_quantize(
            student,
            targets,
            optimizer,
            training,
            validation,
            batch_size=batch_size,
            max_seq_length=len(rows[0][0]),
            seed=seed,
            dtype=dtype,
        )


@contextmanager
def without_first_batches(rows: Sequence[Any], count: int) -> Iterator[None]:
    """Let mlx-lm's DWQ leave out the first batches of some rows until the block ends; others keep their order."""
    from mlx_lm.quant import dwq

    plain = dwq.iterate_batches

    def batches(dataset: Any, *arguments: Any, **named: Any) -> Iterator[Any]:
        return islice(plain(dataset, *arguments, **named), count if dataset is rows else 0, None)

    with patching.attributes((dwq, "iterate_batches", batches), by=__name__):
        yield


class _SavingAdam(optim.Adam):  # type: ignore[misc]
    """Adam that notes what it has trained; mlx-lm's function evaluates it before it asks for the next targets."""

    def __init__(self, learning_rate: float, saves: TuningSaves) -> None:
        super().__init__(learning_rate=learning_rate, bias_correction=True)
        self._saves, self._number = saves, saves.first
        self._moved: Any = None

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        self._saves.forget()
        self._moved = super().apply_gradients(gradients, parameters)
        self._number += 1
        return self._moved

    def note(self) -> None:
        """Note the state after the last step, which is evaluated."""
        if self._moved is None:
            return
        arrays = {f"{_TRAINED}{name}": value for name, value in tree_flatten(self._moved)}
        arrays |= {f"{_AVERAGES}{name}": value for name, value in tree_flatten(self.state)}
        self._moved = None
        self._saves.note(self._number, lambda: arrays)


def _restore(student: nn.Module, optimizer: optim.Adam, begun: TuningState) -> None:
    """Set the scales and biases of a model, in fp32, and the averages of an optimizer."""
    student.update(_trained(begun))
    optimizer.state = _part(begun, _AVERAGES)


def _trained(begun: TuningState | None) -> Any:
    return {} if begun is None else _part(begun, _TRAINED)


def _part(begun: TuningState, prefix: str) -> Any:
    named = [(name.removeprefix(prefix), value) for name, value in begun.arrays.items() if name.startswith(prefix)]
    return tree_unflatten(named)
