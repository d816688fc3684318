"""Numbers of MLX's arrays as NumPy's arrays, or an exception."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx
    from numpy.typing import NDArray


def numpy_of(array: "mx.array", *, copy: bool = True) -> "NDArray[Any]":
    """Evaluate an array and return its numbers.

    `numpy.array` alone evaluates it too, but ignores an exception of the evaluation, such as that of a lost connection
    or of a file that cannot be read to its end, and returns whatever the memory holds.

    Args:
        array: of a type that NumPy has: not bf16.
        copy: whether the numbers are copied; if not, the result is valid for as long as the array.

    Raises:
        RuntimeError: the evaluation failed.
    """
    import mlx.core as mx
    import numpy as np

    mx.eval(array)
    return np.array(array, copy=copy)
