"""Many small arrays as a few long ones, so that an operation on all of them takes a few kernel launches."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

# Numbers in one partial sum: a single long sum in fp32 loses precision
_SUMMED_AT_ONCE = 1024

#: Long arrays that many leaves are split into, about equal: ranks send one while they compute the next.
PARTS = 8

# Leaves of fewer numbers in all are not split; a long array has fewer than MLX can index
_FEW, _MOST = 1 << 16, 1 << 30

#: Path and shape of an array in a tree.
Leaf = tuple[str, tuple[int, ...]]


class FlatLayout:
    """The offset of each array of a tree in long arrays: of shape (1, N) for matrices, (N,) for vectors.

    Each dtype has long arrays of its own; many numbers have several, of whole leaves. `scatter` returns views that
    share the memory of the long arrays.

    Args:
        tree: of arrays; their shapes and dtypes define the layout.
        parts: number of long arrays that many leaves are split into.
        apart: paths of leaves in long arrays of their own, with "split" in their names: parts of weights.

    Attributes:
        places: the leaves of a long array in their order, by the name of the long array.
    """

    def __init__(self, tree: Any, *, parts: int = PARTS, apart: Collection[str] = ()) -> None:
        kinds: dict[str, list[Leaf]] = {}
        for path, leaf in tree_flatten(tree):
            kind = "vectors" if leaf.ndim < 2 else "matrices"
            kind += "_split" if path in apart else ""
            kinds.setdefault(f"{kind}_{str(leaf.dtype).rpartition('.')[2]}", []).append((path, leaf.shape))
        self.places: dict[str, list[Leaf]] = {}
        for name, leaves in kinds.items():
            groups = split_leaves(leaves, parts=parts)
            for number, group in enumerate(groups):
                self.places[name if len(groups) == 1 else f"{name}_{number}"] = group

    def gather(self, tree: Any) -> dict[str, mx.array]:
        """Return the leaves of a tree as long arrays; their dtypes may differ from those of the layout."""
        return self.gather_known(dict(tree_flatten(tree)))

    def gather_known(self, leaves: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the long arrays all of whose leaves are given, by their paths."""
        known = {name: places for name, places in self.places.items() if all(path in leaves for path, _ in places)}
        return self.shaped(
            {name: mx.concatenate([leaves[path].reshape(-1) for path, _ in places]) for name, places in known.items()}
        )

    def shaped(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return long arrays of one dimension in their shapes."""
        return {name: array[None] if name.startswith("matrices") else array for name, array in arrays.items()}

    def scatter(self, arrays: dict[str, mx.array]) -> Any:
        """Return long arrays as a tree of views."""
        return tree_unflatten(list(self.leaves(arrays).items()))

    def leaves(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the leaves of some or all long arrays as views, by their paths."""
        leaves = {}
        for name in (name for name in self.places if name in arrays):
            flat, begin = arrays[name].reshape(-1), 0
            for path, shape in self.places[name]:
                end = begin + math.prod(shape)
                leaves[path] = flat[begin:end].reshape(shape)
                begin = end
        return leaves


def split_leaves(leaves: list[Leaf], *, parts: int = PARTS) -> list[list[Leaf]]:
    """Return leaves in their order in groups of about equal size; a single large leaf is a group of its own.

    Args:
        leaves: in the order of the tree.
        parts: number of groups of leaves with many numbers.
    """
    most = min(_MOST, max(_FEW, sum(math.prod(shape) for _, shape in leaves) // parts))
    groups: list[list[Leaf]] = [[]]
    size = 0
    for path, shape in leaves:
        if size and size + math.prod(shape) > most:
            groups.append([])
            size = 0
        groups[-1].append((path, shape))
        size += math.prod(shape)
    return groups


def is_split(name: str) -> bool:
    """Return whether a long array holds parts of weights whose rest other ranks have."""
    return "split" in name


def sum_of_squares(array: mx.array) -> mx.array:
    """Return the sum of the squares of all numbers in fp32, a scalar."""
    squares = array.reshape(-1).astype(mx.float32).square()
    whole = squares.size // _SUMMED_AT_ONCE * _SUMMED_AT_ONCE
    if whole in (0, squares.size):
        return squares.reshape(-1, _SUMMED_AT_ONCE if whole else squares.size).sum(-1).sum()
    return squares[:whole].reshape(-1, _SUMMED_AT_ONCE).sum(-1).sum() + squares[whole:].sum()
