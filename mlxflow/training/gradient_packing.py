"""The sums of an update as a few arrays for other ranks, in the order in which the backward pass computes them."""

import math
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.training.flat_parameters import FlatLayout, Leaf, is_split, split_leaves

# Arrays of fewer numbers are sent together, in fp32
_FEW = 1 << 16


class Gradients(NamedTuple):
    """Sums over the target tokens; all lazy.

    Attributes:
        total: of the losses in nats, a scalar in fp32.
        targets: number of target tokens, a scalar in fp32.
        tree: of the gradients of the losses, as the model's trainable parameters.
    """

    total: mx.array
    targets: mx.array
    tree: Any


class Joined(NamedTuple):
    """Sums over the target tokens, the gradients as the optimizer's update takes them; all lazy.

    Attributes:
        total: of the losses in nats, a scalar in fp32.
        targets: number of target tokens, a scalar in fp32.
        arrays: of the gradients, see `Update.join`.
    """

    total: mx.array
    targets: mx.array
    arrays: Any


class GradientPacking:
    """Packs the gradients of a model into arrays of one dimension, and sums of such arrays into the update's form.

    The last layers come first, as in the backward pass; the last array holds, in fp32, all that is small: the sum of
    the losses, the number of targets, and short gradients.

    Args:
        trainable: tree of the trainable weights.
        layout: of the long arrays of the update; None if it takes a tree.
    """

    def __init__(self, trainable: Any, layout: FlatLayout | None) -> None:
        leaves = [(path, leaf.shape) for path, leaf in tree_flatten(trainable)]
        self._layout = layout
        places = layout.places if layout else {str(at): group for at, group in enumerate(split_leaves(leaves))}
        self._long = {name: group for name, group in reversed(places.items()) if _is_long(name, group)}
        self._short = {name: group for name, group in places.items() if not _is_long(name, group)}

    @property
    def names(self) -> list[str]:
        """The names of the arrays to send: of the long ones as in the layout; empty for the last one."""
        return [*self._long, ""]

    def pack(self, gradients: Gradients) -> list[mx.array]:
        """Return the arrays to send."""
        leaves = dict(tree_flatten(gradients.tree))
        short = [_joined(leaves, group).astype(mx.float32) for group in self._short.values()]
        scalars = [gradients.total.reshape(1), gradients.targets.reshape(1)]
        return [*(_joined(leaves, group) for group in self._long.values()), mx.concatenate([*scalars, *short])]

    def unpack(self, arrays: list[list[mx.array]]) -> Joined:
        """Return sums of such arrays as the update takes them.

        Args:
            arrays: the pieces of each; of a long one they may be of one rank's part.
        """
        *long, small = [pieces[0] if len(pieces) == 1 else mx.concatenate(pieces) for pieces in arrays]
        found = dict(zip(self._long, long, strict=True))
        begin = 2
        for name, group in self._short.items():
            found[name] = small[begin : begin + _size(group)]
            begin += _size(group)
        if self._layout is not None:
            ordered = {name: found[name] for name in self._layout.places}
            return Joined(small[0], small[1], self._layout.shaped(ordered))
        return Joined(small[0], small[1], self._tree(found))

    def _tree(self, found: dict[str, mx.array]) -> Any:
        leaves = {}
        for name, group in {**self._long, **self._short}.items():
            begin = 0
            for path, shape in group:
                end = begin + math.prod(shape)
                leaves[path] = found[name][begin:end].reshape(shape)
                begin = end
        return tree_unflatten(list(leaves.items()))


def _is_long(name: str, group: list[Leaf]) -> bool:
    """Return whether an array is sent by itself; parts of weights are not sent at all, and stay apart."""
    return _size(group) >= _FEW or is_split(name)


def _joined(leaves: dict[str, mx.array], group: list[Leaf]) -> mx.array:
    return mx.concatenate([leaves[path].reshape(-1) for path, _ in group])


def _size(group: list[Leaf]) -> int:
    return sum(math.prod(shape) for _, shape in group)
