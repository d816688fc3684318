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
    """

    def __init__(self, tree: Any) -> None:
        self._places: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for path, leaf in tree_flatten(tree):
            kind = "vectors" if leaf.ndim < 2 else "matrices"
            self._places.setdefault(f"{kind}_{str(leaf.dtype).rpartition('.')[2]}", []).append((path, leaf.shape))

    def gather(self, tree: Any) -> dict[str, mx.array]:
        """Return the leaves of a tree as long arrays; their dtypes may differ from those of the layout."""
        leaves = dict(tree_flatten(tree))
        return {
            name: _long([leaves[path] for path, _ in places], name.startswith("matrices"))
            for name, places in self._places.items()
        }

    def scatter(self, arrays: dict[str, mx.array]) -> Any:
        """Return long arrays as a tree of views."""
        leaves = []
        for name, places in self._places.items():
            flat, begin = arrays[name].reshape(-1), 0
            for path, shape in places:
                end = begin + _size(shape)
                leaves.append((path, flat[begin:end].reshape(shape)))
                begin = end
        return tree_unflatten(leaves)


def _long(leaves: list[mx.array], is_matrix: bool) -> mx.array:
    flat = mx.concatenate([leaf.reshape(-1) for leaf in leaves])
    return flat[None] if is_matrix else flat


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
