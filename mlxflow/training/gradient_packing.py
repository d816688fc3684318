"""The sums of an update as a few arrays for other ranks, in the order in which the backward pass computes them."""

from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlxflow.training.flat_parameters import FlatLayout

# Arrays of fewer numbers are sent together, in fp32
_FEW = 1 << 16

#: Parts that the gradients are sent in, about equal: one is sent while the backward pass computes the next.
PARTS = 8


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


class _LeafGroup(NamedTuple):
    """Leaves that are sent as one array.

    Attributes:
        name: of the long array that they are a part of; empty if there is none.
        leaves: path and shape of each, in the order of the tree.
    """

    name: str
    leaves: list[tuple[str, tuple[int, ...]]]


class GradientPacking:
    """Packs the gradients of a model into arrays of one dimension, and sums of such arrays into the update's form.

    The last layers come first, as in the backward pass; the last array holds, in fp32, all that is small: the sum of
    the losses, the number of targets, and short gradients.

    Args:
        trainable: tree of the trainable weights.
        layout: of the long arrays of the update; None if it takes a tree.
        parts: number of parts of about equal size.
    """

    def __init__(self, trainable: Any, layout: FlatLayout | None, *, parts: int = PARTS) -> None:
        leaves = [(path, leaf.shape) for path, leaf in tree_flatten(trainable)]
        self._layout = layout
        places = {"": leaves} if layout is None else layout.places
        self._small: list[_LeafGroup] = []
        self._parts: list[_LeafGroup] = []
        most = max(_FEW, sum(_size(shape) for _, shape in leaves) // parts)
        for name, of_name in places.items():
            if sum(_size(shape) for _, shape in of_name) < _FEW:
                self._small.append(_LeafGroup(name, of_name))
            else:
                self._parts += _split(name, of_name, most)
        self._parts.reverse()

    def pack(self, gradients: Gradients) -> list[mx.array]:
        """Return the arrays to send."""
        leaves = dict(tree_flatten(gradients.tree))
        small = [_long(leaves, part).astype(mx.float32) for part in self._small]
        scalars = [gradients.total.reshape(1), gradients.targets.reshape(1)]
        return [*(_long(leaves, part) for part in self._parts), mx.concatenate([*scalars, *small])]

    def unpack(self, arrays: list[list[mx.array]]) -> Joined:
        """Return sums of such arrays as the update takes them.

        Args:
            arrays: the pieces of each.
        """
        *long, last = arrays
        small = last[0] if len(last) == 1 else mx.concatenate(last)
        found: dict[str, list[mx.array]] = {}
        for part, pieces in zip(reversed(self._parts), reversed(long), strict=True):
            found.setdefault(part.name, []).extend(pieces)
        begin = 2
        for part in self._small:
            end = begin + sum(_size(shape) for _, shape in part.leaves)
            found[part.name] = [small[begin:end]]
            begin = end
        joined = {name: parts[0] if len(parts) == 1 else mx.concatenate(parts) for name, parts in found.items()}
        return Joined(small[0], small[1], self._shaped(joined))

    def _shaped(self, joined: dict[str, mx.array]) -> Any:
        if self._layout is not None:
            return self._layout.shaped(joined)
        leaves, begin = [], 0
        for path, shape in [leaf for part in (*self._small, *reversed(self._parts)) for leaf in part.leaves]:
            leaves.append((path, joined[""][begin : begin + _size(shape)].reshape(shape)))
            begin += _size(shape)
        return tree_unflatten(leaves)


def _split(name: str, leaves: list[tuple[str, tuple[int, ...]]], most: int) -> list[_LeafGroup]:
    """Return leaves in parts of at most `most` numbers, except where a leaf alone has more."""
    parts, size = [_LeafGroup(name, [])], 0
    for path, shape in leaves:
        if size and size + _size(shape) > most:
            parts.append(_LeafGroup(name, []))
            size = 0
        parts[-1].leaves.append((path, shape))
        size += _size(shape)
    return parts


def _long(leaves: dict[str, mx.array], part: _LeafGroup) -> mx.array:
    return mx.concatenate([leaves[path].reshape(-1) for path, _ in part.leaves])


def _size(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
