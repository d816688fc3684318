"""Parts of long arrays that one of several ranks keeps (ZeRO-1, Rajbhandari et al. 2020, arXiv:1910.02054).

Each rank updates its part of the weights and keeps the optimizer's state of that part alone; then all ranks gather the
updated weights. A checkpoint holds whole arrays, so that any number of ranks continues from it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from mlxflow.distributed.team import Team

# A part is a multiple of so many numbers; arrays with fewer for each rank are not split
_UNIT = 1024


class OptimizerShards:
    """The parts of one rank.

    Args:
        weights: long arrays by name, (1, N) or (N,).
        team: of this process.
    """

    def __init__(self, weights: Mapping[str, mx.array], team: Team) -> None:
        self._team = team
        self._shapes = {
            name: array.shape for name, array in weights.items() if array.size >= _UNIT * team.size and team.size > 1
        }

    def own(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return this rank's parts of long arrays, the last one filled up with zeros; parts are left as they are."""
        return {name: self._own(array) if self._is_whole(name, array) else array for name, array in arrays.items()}

    def splits(self, name: str) -> bool:
        """Return whether the ranks keep parts of a long array."""
        return name in self._shapes

    def rows(self, array: mx.array) -> mx.array:
        """Return a whole array as the parts of all ranks, (number of ranks, N), the last one filled up with zeros."""
        count = self._team.size
        return mx.pad(array.reshape(-1), (0, self._size(array.size) * count - array.size)).reshape(count, -1)

    def sum_over(self, arrays: Mapping[str, mx.array], figure: Callable[[mx.array], mx.array]) -> list[mx.array]:
        """Return a figure of each array, to add: of parts, one sum over all of them and all ranks; a collective.

        Args:
            arrays: whole or parts, the same on all ranks.
            figure: of an array, a scalar in fp32 such as the sum of its squares.
        """
        whole = [
            figure(array) for name, array in arrays.items() if self._is_whole(name, array) or not self.splits(name)
        ]
        parts = [
            figure(array) for name, array in arrays.items() if self.splits(name) and not self._is_whole(name, array)
        ]
        if not parts:
            return whole
        return [*whole, self._team.gather_within(mx.stack(parts).sum().reshape(1)).sum()]

    def _is_whole(self, name: str, array: mx.array) -> bool:
        return name in self._shapes and array.size == math.prod(self._shapes[name])

    def whole(self, parts: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return long arrays from the parts of all ranks; a collective, in the order of the names."""
        found = dict(parts)
        before: mx.array | None = None
        for name in self._shapes:
            part = parts[name] if before is None else mx.depends(parts[name], before)
            found[name] = before = self._whole(name, part)
        return found

    def own_state(self, state: Any) -> Any:
        """Return a tree like the state of an optimizer, with this rank's parts for whole arrays."""
        return self._changed(state, lambda _, array: self._own(array))

    def whole_state(self, state: Any) -> Any:
        """Return the state of an optimizer with whole arrays for this rank's parts; a collective.

        The arrays are gathered one after another and kept by rank 0 alone: others get empty ones.
        """

        def gather(name: str, part: mx.array) -> mx.array:
            whole = self._whole(name, part)
            mx.eval(whole)
            return whole if self._team.rank.is_first else mx.zeros(0, part.dtype)

        return self._changed(state, gather)

    def state_like(self, state: Any) -> Any:
        """Return a tree of arrays, which are never computed, of the shapes and dtypes of `whole_state`."""
        return self._changed(state, lambda name, part: mx.zeros(self._shapes[name], part.dtype))

    def _own(self, array: mx.array) -> mx.array:
        size, count = self._size(array.size), self._team.size
        flat = array.reshape(-1)
        begin = min(array.size, size * self._team.rank.number)
        part = flat[begin : min(array.size, begin + size)]
        if size * count != array.size:
            part = mx.pad(part, (0, size - part.size))
        return part[None] if array.ndim > 1 else part

    def _whole(self, name: str, part: mx.array) -> mx.array:
        shape = self._shapes[name]
        gathered = self._team.gather_within(part.reshape(1, -1))
        return gathered.reshape(-1)[: max(shape)].reshape(shape)

    def _size(self, numbers: int) -> int:
        """Return the numbers of a part of an array of so many numbers."""
        return -(-numbers // (_UNIT * self._team.size)) * _UNIT

    def _changed(self, tree: Any, change: Callable[[str, mx.array], mx.array], name: str = "") -> Any:
        """Return a tree with changed arrays below the names of long arrays that are split."""
        if isinstance(tree, dict):
            return {
                key: self._changed(value, change, key if key in self._shapes else name) for key, value in tree.items()
            }
        if isinstance(tree, list | tuple):
            return [self._changed(value, change, name) for value in tree]
        return change(name, tree) if name and isinstance(tree, mx.array) and tree.size > 1 else tree
