"""A digest of weights that the device computes, to compare ranks: integer sums, which have no order."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

# Numbers whose factors are held at a time
_AT_ONCE = 1 << 22

_FACTOR, _MIX = 2654435761, 0x9E3779B1


def digest_of(tree: Any) -> mx.array:
    """Return a 32-bit digest of every bit of the arrays of a tree and of their order, a scalar; lazy.

    A changed, moved or swapped number changes it; it is no protection against intent.
    """
    total = mx.array(0, mx.uint32)
    for _, array in tree_flatten(tree):
        bits = array.reshape(-1).view(mx.uint8 if array.nbytes % 4 else mx.uint32).astype(mx.uint32)
        for begin in range(0, bits.size, _AT_ONCE):
            part = bits[begin : begin + _AT_ONCE]
            factors = mx.arange(part.size, dtype=mx.uint32) * _FACTOR + 1 | 1
            total = total * _MIX + (part * factors).sum()
    return total
