"""Round a matrix column by column so that later columns compensate the errors of earlier ones, on a fixed grid.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) with two differences. The grids of all groups are chosen first, so the
columns may be rounded in any order: those with the largest inputs first, which MLX's format stores like any other
codes. And the result is the compensated weights before rounding, from which training may start.

No matrix is inverted: GPTQ is Babai's nearest plane algorithm on a Cholesky factor of the inputs (Chen et al. 2025,
arXiv:2507.18553), so one triangle in fp32, computed in place, is all that is held besides the inputs.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxflow.storage.host_arrays import numpy_of

# Share of the mean diagonal that is added to it: few rows leave directions without inputs. Raised until the matrix has
# an inverse
_DAMPING = (0.01, 0.1, 1.0)

# Columns whose errors are collected before all later columns are updated by one product
_COLUMNS_AT_ONCE = 64

# Columns that are factored at a time, and columns, or rows, of the rest that are updated or copied at a time
_PANEL, _STRIPE = 256, 1024

# Numbers of a matrix that are compensated at a time; copies are several times as large
_NUMBERS_AT_ONCE = 1 << 24

#: Rounds positions, weights in units of their scale without bias, to codes.
Rounding = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Compensation:
    """Compensates matrices that have the same inputs, or parts of their rows.

    Args:
        inputs: sum over inputs of x x^T, (D, D); not needed afterwards.
    """

    def __init__(self, inputs: NDArray[np.float32]) -> None:
        # the last column is rounded first, so that a row of the triangle has the columns that come after it
        self._order = np.argsort(-np.diag(inputs), kind="stable")[::-1]
        self._triangle = _unit_triangle(inputs, self._order)

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
        if self._triangle is None:
            return weight.copy()
        width = weight.shape[-1]
        rows = weight.reshape(-1, width)
        scales, biases = (part.reshape(len(rows), -1) for part in grid)
        result = np.empty_like(rows)
        step = max(1, _NUMBERS_AT_ONCE // width)
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            columns = self._columnwise(self._triangle, rows[part], scales[part], biases[part], nearest)
            result[part, self._order] = columns.T
        return result.reshape(weight.shape)

    def _columnwise(
        self,
        triangle: NDArray[np.float32],
        rows: NDArray[np.float32],
        scales: NDArray[np.float32],
        biases: NDArray[np.float32],
        nearest: Rounding,
    ) -> NDArray[np.float32]:
        """Return the compensated columns, (D, N), in their order, of rows, (N, D), and a grid, (N, D / G)."""
        order, width = self._order, rows.shape[1]
        columns = rows.T[order]  # each is consecutive in memory
        scales = np.where(scales == 0, np.float32(1), scales).T
        biases, groups = biases.T, order * scales.shape[0] // width
        for end in range(width, 0, -_COLUMNS_AT_ONCE):
            begin = max(0, end - _COLUMNS_AT_ONCE)
            errors = rows.T[order[begin:end]]  # of the stored numbers, compensated or not
            for place in range(end - 1, begin - 1, -1):
                scale, bias = scales[groups[place]], biases[groups[place]]
                codes = nearest((columns[place] - bias) / scale)
                errors[place - begin] -= codes * scale + bias
                columns[begin:place] += np.outer(triangle[place, begin:place], errors[place - begin])
            columns[:begin] += triangle[begin:end, :begin].T @ errors
        return columns


class Compensations:
    """Compensations of layers by their paths: one for layers with the same inputs, made when the first is taken.

    Args:
        products: sum over the inputs of x x^T of each layer, (D, D); removed, and so freed, once it is factored.
    """

    def __init__(self, products: dict[str, mx.array]) -> None:
        self._products = products
        self._made: dict[str, Compensation] = {}

    def take(self, path: str) -> Compensation | None:
        """Return the compensation of a layer; None if it has no inputs. Each path is taken once."""
        inputs = self._products.get(path)
        if inputs is not None:
            readers = [other for other, product in self._products.items() if product is inputs]
            compensation = Compensation(numpy_of(inputs, copy=False))
            for reader in readers:
                del self._products[reader]
            self._made |= dict.fromkeys(readers, compensation)
        return self._made.pop(path, None)


def _unit_triangle(inputs: NDArray[np.float32], order: NDArray[np.intp]) -> NDArray[np.float32] | None:
    """Return the lower Cholesky factor of a matrix in some order, with damping, each column divided by its diagonal.

    None if the matrix is not finite, or has no such factor.
    """
    mean = float(np.mean(np.diag(inputs)))
    for damping in _DAMPING if mean > 0 and np.isfinite(mean) else ():
        factor = np.empty_like(inputs)
        for begin in range(0, len(factor), _STRIPE):
            part = slice(begin, begin + _STRIPE)
            factor[part] = inputs[order[part]][:, order]
            if not np.isfinite(factor[part]).all():
                return None
        np.einsum("ii->i", factor)[:] += np.float32(damping * mean)
        try:
            _factor_in_place(factor)
        except np.linalg.LinAlgError:
            continue
        factor /= np.diag(factor).copy()
        return factor
    return None


def _factor_in_place(matrix: NDArray[np.float32]) -> None:
    """Replace the lower triangle of a symmetric matrix by its Cholesky factor; what lies above is left as it is.

    Raises:
        LinAlgError: the matrix is not positive definite.
    """
    width = len(matrix)
    for begin in range(0, width, _PANEL):
        end = min(begin + _PANEL, width)
        corner = np.linalg.cholesky(matrix[begin:end, begin:end].astype(np.float64))
        matrix[begin:end, begin:end] = corner
        below = np.linalg.inv(corner).T.astype(np.float32)
        for first in range(end, width, _STRIPE):
            stripe = slice(first, first + _STRIPE)
            matrix[stripe, begin:end] = matrix[stripe, begin:end] @ below
        for first in range(end, width, _STRIPE):
            stripe = slice(first, first + _STRIPE)
            matrix[first:, stripe] -= matrix[first:, begin:end] @ matrix[stripe, begin:end].T
