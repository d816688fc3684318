"""Round a matrix column by column so that later columns compensate the errors of earlier ones, on a fixed grid.

GPTQ (Frantar et al. 2022, arXiv:2210.17323) with two differences. The grids of all groups are chosen first, so the
columns may be rounded in any order: those with the largest inputs first, which MLX's format stores like any other
codes. And the result is the compensated weights before rounding, from which training may start.

No matrix is inverted: GPTQ is Babai's nearest plane algorithm on a Cholesky factor of the inputs (Chen et al. 2025,
arXiv:2507.18553), so one triangle in fp32, computed in place, is all that is held besides the inputs.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxflow.device.numpy_blas import single_threaded
from mlxflow.storage.host_arrays import numpy_of

# Share of the mean diagonal that is added to it: few rows leave directions without inputs. Raised until the matrix has
# an inverse
_DAMPING = (0.01, 0.1, 1.0)

# Columns whose errors are collected before all others are updated by products, and columns that are updated at a time
_COLUMNS_AT_ONCE, _UPDATED_AT_ONCE = 256, 256

# Columns that are updated one by one, not by products
_COLUMNS_ALONE = 16

#: Threads of a compensation at most: more of them wait for the interpreter.
MOST_THREADS = 4

# Rows that a thread compensates at a time at most. The parts do not depend on the machine, since a product of another
# shape may round its sums differently
_ROWS_AT_ONCE = 1024

# Columns that are factored at a time, and columns, or rows, of the rest that are updated or copied at a time
_PANEL, _STRIPE = 256, 1024

# Rows and columns of a matrix that are transposed at a time
_TILE = 128

# Numbers of a matrix that are compensated at a time, by all threads; copies are several times as large
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
        triangle = self._triangle
        if triangle is None:
            return weight.copy()
        width = weight.shape[-1]
        rows = weight.reshape(-1, width)
        scales, biases = (part.reshape(len(rows), -1) for part in grid)
        result = np.empty_like(rows)
        step = max(1, min(_ROWS_AT_ONCE, _NUMBERS_AT_ONCE // (MOST_THREADS * width)))

        def compensate(begin: int) -> None:
            part = slice(begin, begin + step)
            columns = _transposed(rows[part])
            self._compensate(triangle, columns, scales[part], biases[part], nearest)
            result[part] = _transposed(columns)

        with single_threaded() as count, ThreadPoolExecutor(min(count, MOST_THREADS)) as threads:
            for _ in threads.map(compensate, range(0, len(rows), step)):
                pass  # an error in a thread is raised here
        return result.reshape(weight.shape)

    def _compensate(
        self,
        triangle: NDArray[np.float32],
        stored: NDArray[np.float32],
        scales: NDArray[np.float32],
        biases: NDArray[np.float32],
        nearest: Rounding,
    ) -> None:
        """Compensate columns, (D, N), in place, for their rounding to a grid, (N, D / G)."""
        order, width = self._order, len(stored)
        columns = stored[order]
        scales = np.where(scales == 0, np.float32(1), scales).T.copy()
        biases, groups = biases.T.copy(), order * len(scales) // width
        products = np.empty((_UPDATED_AT_ONCE, columns.shape[1]), np.float32)
        for end in range(width, 0, -_COLUMNS_AT_ONCE):
            begin = max(0, end - _COLUMNS_AT_ONCE)
            panel = slice(begin, end)
            errors = stored[order[panel]]  # of the stored numbers, compensated or not
            _round_panel(
                _Panel(triangle[panel, panel], columns[panel], errors, groups[panel]),
                (scales, biases),
                nearest,
                products,
            )
            for first in range(0, begin, _UPDATED_AT_ONCE):
                part = slice(first, min(first + _UPDATED_AT_ONCE, begin))
                _add_product(columns[part], triangle[panel, part], errors, products)
        stored[order] = columns


class _Panel(NamedTuple):
    """Columns that are rounded one after the other, the last one first.

    Attributes:
        triangle: their part of it, (C, C).
        columns: weights, (C, N); those of later columns are compensated here.
        errors: weights, (C, N), from which the rounded ones are subtracted.
        groups: of the columns, (C,).
    """

    triangle: NDArray[np.float32]
    columns: NDArray[np.float32]
    errors: NDArray[np.float32]
    groups: NDArray[np.intp]

    def part(self, begin: int, end: int) -> "_Panel":
        """Return some of the columns."""
        some = slice(begin, end)
        return _Panel(self.triangle[some, some], self.columns[some], self.errors[some], self.groups[some])


def _round_panel(
    panel: _Panel,
    grid: tuple[NDArray[np.float32], NDArray[np.float32]],
    nearest: Rounding,
    products: NDArray[np.float32],
) -> None:
    """Round columns, each compensated for those before it: by products for half of the columns, and so on.

    Args:
        panel: changed in place.
        grid: scales and biases, (D / G, N) each.
        nearest: rounds to the codes of the grid.
        products: memory for results, at least (C, N).
    """
    count = len(panel.columns)
    if count > _COLUMNS_ALONE:
        middle = count // 2
        last = panel.part(middle, count)
        _round_panel(last, grid, nearest, products)
        _add_product(panel.columns[:middle], panel.triangle[middle:, :middle], last.errors, products)
        _round_panel(panel.part(0, middle), grid, nearest, products)
        return
    triangle, columns, errors, groups = panel
    for place in range(count - 1, -1, -1):
        scale, bias = (part[groups[place]] for part in grid)
        positions = columns[place] - bias
        positions /= scale
        rounded = nearest(positions)
        rounded *= scale
        rounded += bias
        errors[place] -= rounded
        update = np.multiply(triangle[place, :place, None], errors[place], out=products[:place])
        columns[:place] += update


def _add_product(
    columns: NDArray[np.float32],
    triangle: NDArray[np.float32],
    errors: NDArray[np.float32],
    products: NDArray[np.float32],
) -> None:
    """Add what errors, (C, N), change in other columns, (K, N), by their part of the triangle, (C, K)."""
    columns += np.matmul(triangle.T, errors, out=products[: len(columns)])


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


def _transposed(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the transpose of a matrix, copied; by tiles that fit into a cache, which NumPy's copy is not."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, matrix.shape[0], _TILE):
        for column in range(0, matrix.shape[1], _TILE):
            tile = matrix[row : row + _TILE, column : column + _TILE]
            result[column : column + _TILE, row : row + _TILE] = tile.T
    return result


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
