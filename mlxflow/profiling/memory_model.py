"""A model of the peak memory of a training step over batch size and context length, fitted to a few trials.

The peak of the forward and backward pass is a constant, plus a term for each token, plus a term for each pair of tokens
in a row. With the fused loss, the coefficients differ between steps of one chunk of tokens and of several. The peak of
the update does not depend on the shape. The coefficients are fitted to measured points; one more point is measured to
check the prediction.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlxflow.profiling.step_memory import Peaks, ProfiledModel, trial
from mlxflow.training.objective import chunk_rows
from mlxflow.training.settings import TrainingSettings

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Point(NamedTuple):
    """A shape of batches and the measured peaks of a step with it.

    Attributes:
        batch_size: rows in one forward pass, B.
        context_length: of a row, L.
        peaks: of a step, in bytes.
    """

    batch_size: int
    context_length: int
    peaks: Peaks


class Law(NamedTuple):
    """The peak of a step as a function of the shape.

    Attributes:
        weights: coefficients in bytes of the constant, the tokens and the pairs, for the forward and backward pass.
        beyond: the same for passes with more than one chunk of tokens.
        update: the update's peak in bytes.
        chunk: tokens whose logits are held at a time; 0 for all.
    """

    weights: tuple[float, ...]
    beyond: tuple[float, ...]
    update: float
    chunk: int

    def peak_bytes(self, batch_size: int, context_length: int) -> float:
        """Return the predicted peak of a step in bytes, above the memory in use before the model was loaded."""
        is_beyond = 0 < self.chunk < batch_size * context_length
        weights = self.beyond if is_beyond else self.weights
        return max(float(np.dot(_terms(batch_size, context_length), weights)), self.update)

    def largest_batch_size(self, context_length: int, limit_bytes: int) -> int:
        """Return the largest number of rows of a length whose step fits into a limit; 0 for none."""
        low, high = 0, 1
        while self.peak_bytes(high, context_length) <= limit_bytes and high < 1 << 24:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_bytes(middle, context_length) <= limit_bytes else (low, middle)
        return low


def _terms(batch_size: int, context_length: int) -> list[float]:
    tokens = batch_size * context_length
    return [1.0, tokens, tokens * context_length]


def fit_law(points: Sequence[Point], *, chunk: int) -> Law:
    """Fit non-negative coefficients to measured points, by least squares of the relative errors.

    Args:
        points: at least three of different shapes; with a chunk, also three with more tokens than one chunk.
        chunk: tokens whose logits the loss holds at a time; 0 for all.
    """
    beyond = [point for point in points if 0 < chunk < point.batch_size * point.context_length]
    within = [point for point in points if point not in beyond]
    update = max(point.peaks.update for point in points)
    return Law(_weights(within or beyond), _weights(beyond or within), update, chunk)


def _weights(points: Sequence[Point]) -> tuple[float, ...]:
    rows = np.array([_terms(point.batch_size, point.context_length) for point in points])
    values = np.array([point.peaks.forward_backward for point in points])
    return tuple(_non_negative(rows / values[:, None], np.ones(len(values))).tolist())


def _non_negative(design: "NDArray[np.float64]", targets: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return non-negative least squares, by trying every subset of the columns."""
    best, least = np.zeros(design.shape[1]), np.inf
    for chosen in range(1, 1 << design.shape[1]):
        columns = [column for column in range(design.shape[1]) if chosen >> column & 1]
        part = design[:, columns]
        if len(columns) > len(targets) or not part.any(axis=0).all():
            continue
        scale = np.abs(part).max(axis=0)
        solution = np.linalg.lstsq(part / scale, targets, rcond=None)[0] / scale
        residual = float(((part @ solution - targets) ** 2).sum())
        if (solution >= 0).all() and residual < least - 1e-9:
            best, least = np.zeros(design.shape[1]), residual
            best[columns] = solution
    return best


def measure_points(
    model: ProfiledModel,
    settings: TrainingSettings,
    shapes: Sequence[tuple[int, int]],
    trials: Callable[[ProfiledModel, TrainingSettings], Peaks] = trial,
) -> list[Point]:
    """Run trials with batches of several shapes.

    Args:
        model: the model to train; its context length is ignored.
        settings: of the step; its batch size is ignored.
        shapes: batch sizes and context lengths.
        trials: runs one.
    """
    return [
        Point(size, length, trials(model._replace(context_length=length), settings.replace(batch_size=size)))
        for size, length in shapes
    ]


def held_chunk(model: ProfiledModel, settings: TrainingSettings) -> int:
    """Return the number of tokens whose logits the loss holds at a time; 0 for all."""
    return chunk_rows(model.vocab_size) if settings.fused_loss else 0


def shapes_to_measure(batch_size: int, context_length: int, *, chunk: int) -> list[tuple[int, int]]:
    """Return shapes (batch size, context length) to fit to, and last one to check the prediction with.

    They are smaller than the given shape, to save time. If the loss works in chunks, three more have at least two.
    """
    length, short = context_length, max(1, context_length // 2)
    rows = min(batch_size, max(8, chunk // length)) if chunk else batch_size
    few, fewer = max(2, rows // 4), max(1, rows // 8)
    small = [(fewer, short), (few, short), (fewer, length), (few, length), (fewer, 2 * length)]
    if not chunk:
        return [*small, (2 * few, length)]
    two = -(-2 * chunk // length)
    return [*small, (two, length), (two + two // 2, length), (two, 2 * length), (2 * two, length)]
