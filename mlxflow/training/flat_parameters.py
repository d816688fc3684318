"""Many small arrays as a few long ones, so that an operation on all of them takes a few kernel launches."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

#: Numbers in one partial sum: a single long sum in fp32 loses precision.
_SUMMED_AT_ONCE = 1024


class FlatLayout:
    """The offset of each array of a tree in long arrays: of shape (1, N) for matrices, (N,) for vectors.

    Each dtype has long arrays of its own. `scatter` returns views that share the memory of the long arrays.

    Args:
        tree: of arrays; their shapes and dtypes define the layout.

    Attributes:
        places: path and shape of each array in a long array, by the name of the long array.
    """

    def __init__(self, tree: Any) -> None:
        self.places: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for path, leaf in tree_flatten(tree):
            kind = "vectors" if leaf.ndim < 2 else "matrices"
            self.places.setdefault(f"{kind}_{str(leaf.dtype).rpartition('.')[2]}", []).append((path, leaf.shape))

    def gather(self, tree: Any) -> dict[str, mx.array]:
        """Return the leaves of a tree as long arrays; their dtypes may differ from those of the layout."""
        leaves = dict(tree_flatten(tree))
        return self.shaped(
            {
                name: mx.concatenate([leaves[path].reshape(-1) for path, _ in places])
                for name, places in self.places.items()
            }
        )

    def shaped(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return long arrays of one dimension in their shapes."""
        return {name: array[None] if name.startswith("matrices") else array for name, array in arrays.items()}

    def scatter(self, arrays: dict[str, mx.array]) -> Any:
        """Return long arrays as a tree of views."""
        leaves = []
        for name, places in self.places.items():
            flat, begin = arrays[name].reshape(-1), 0
            for path, shape in places:
                end = begin + _size(shape)
                leaves.append((path, flat[begin:end].reshape(shape)))
                begin = end
        return tree_unflatten(leaves)


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def sum_of_squares(array: mx.array) -> mx.array:
    """Return the sum of the squares of all numbers in fp32, a scalar."""
    squares = array.reshape(-1).astype(mx.float32).square()
    whole = squares.size // _SUMMED_AT_ONCE * _SUMMED_AT_ONCE
    if whole in (0, squares.size):
        return squares.reshape(-1, _SUMMED_AT_ONCE if whole else squares.size).sum(-1).sum()
    return squares[:whole].reshape(-1, _SUMMED_AT_ONCE).sum(-1).sum() + squares[whole:].sum()
