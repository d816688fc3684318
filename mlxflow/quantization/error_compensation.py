"""Round a matrix column by column so that later columns compensate the errors of earlier ones, on a fixed grid.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) with two differences. The grids of all groups are chosen first, so the
columns may be rounded in any order: those with the largest inputs first, which MLX's format stores like any other
codes. And the result is the compensated weights before rounding, from which training may start.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

# Share of the mean diagonal that is added to it: few rows leave directions without inputs. Raised until the matrix has
# an inverse
_DAMPING = (0.01, 0.1, 1.0)

# Columns whose errors are collected before all later columns are updated by one product
_COLUMNS_AT_ONCE = 64

# Numbers of a matrix that are compensated at a time; copies are several times as large
_NUMBERS_AT_ONCE = 1 << 24

#: Rounds positions, weights in units of their scale without bias, to codes.
Rounding = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Compensation:
    """Compensates matrices that have the same inputs, or parts of their rows.

    Args:
        inputs: sum over inputs of x x^T, (D, D).
    """

    def __init__(self, inputs: NDArray[np.float32]) -> None:
        self._order = np.argsort(-np.diag(inputs), kind="stable")
        self._factor = _inverse_factor(inputs[self._order][:, self._order])

    def applied(
        self, weight: NDArray[np.float32], grid: NDArray[np.float32], *, nearest: Rounding
    ) -> NDArray[np.float32]:
        """Return weights that lose less of their products with the inputs when they are rounded to their grid.

        Args:
            weight: (..., D).
            grid: scales and biases, (2, ..., D / G), as they will be stored.
            nearest: rounds to the codes of the grid.

        Returns:
            The weights, (..., D), before rounding.
        """
        width = weight.shape[-1]
        rows = weight.reshape(-1, width)
        scales, biases = (part.reshape(len(rows), -1) for part in grid)
        result = np.empty_like(rows)
        step = max(1, _NUMBERS_AT_ONCE // width)
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            result[part] = self._columnwise(rows[part], scales[part], biases[part], nearest)
        return result.reshape(weight.shape)

    def _columnwise(
        self, rows: NDArray[np.float32], scales: NDArray[np.float32], biases: NDArray[np.float32], nearest: Rounding
    ) -> NDArray[np.float32]:
        """Return compensated rows, (N, D), of a grid of (N, D / G) scales and biases."""
        order, factor, width = self._order, self._factor, rows.shape[1]
        columns = rows.T[order]  # (D, N): each column is consecutive in memory
        scales = np.where(scales == 0, np.float32(1), scales).T
        biases, groups = biases.T, order * scales.shape[0] // width
        for begin in range(0, width, _COLUMNS_AT_ONCE):
            end = min(begin + _COLUMNS_AT_ONCE, width)
            errors = np.empty((end - begin, columns.shape[1]), np.float32)
            for place in range(begin, end):
                scale, bias = scales[groups[place]], biases[groups[place]]
                codes = nearest((columns[place] - bias) / scale)
                error = (columns[place] - codes * scale - bias) / factor[place, place]
                columns[place + 1 : end] -= np.outer(factor[place, place + 1 : end], error)
                errors[place - begin] = error
            columns[end:] -= factor[begin:end, end:].T @ errors
        result = np.empty_like(columns)
        result[order] = columns
        return result.T


def _inverse_factor(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the upper Cholesky factor of the inverse of a matrix, with damping; the identity if it is not finite."""
    width = len(inputs)
    mean = float(np.mean(np.diag(inputs)))
    for damping in _DAMPING if mean > 0 and np.isfinite(inputs).all() else ():
        damped = inputs.astype(np.float64)
        damped[np.arange(width), np.arange(width)] += damping * mean
        try:
            upper: NDArray[np.float64] = np.linalg.cholesky(np.linalg.inv(damped)).T
        except np.linalg.LinAlgError:
            continue
        return np.ascontiguousarray(upper.astype(np.float32))
    return np.eye(width, dtype=np.float32)
