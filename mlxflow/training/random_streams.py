"""The random state at each forward pass of a run, so that several ranks draw the numbers that one process draws.

MLX derives the next state from the last one each time a number is drawn, and every forward pass of a model draws
equally often. How often is counted in the first one.
"""

from typing import cast

import mlx.core as mx

from mlxflow.ops.random_state import put_random_key

Key = tuple[int, int]

# A forward pass that draws more often is not believed
_MOST_DRAWS = 1 << 20


class RandomStream:
    """Sets MLX's random state before each forward pass of an update.

    Attributes:
        draws: random arrays that a forward pass draws; -1 while that is not known.
    """

    def __init__(self) -> None:
        self.draws = -1
        self._base: Key = (0, 0)

    def begin_update(self) -> None:
        """Note the state before the first forward pass of an update."""
        if self.draws:
            self._base = _current_key()

    def begin_pass(self, number: int) -> None:
        """Set the state before a forward pass.

        Args:
            number: of the pass in the update, from 0; if `draws` is not known yet, that of any pass is set.
        """
        if self.draws > 0:
            put_random_key(_array(_advanced(self._base, number * self.draws)))
        elif self.draws < 0:
            put_random_key(_array(self._base))

    def count_draws(self) -> bool:
        """Count the draws of the pass that was just evaluated; return whether it must be repeated with its own state.

        Waits for the pass.

        Raises:
            RuntimeError: the state is none that draws lead to.
        """
        after, key = _current_key(), self._base
        for draws in range(_MOST_DRAWS):
            if key == after:
                self.draws = draws
                return draws > 0
            key = _advanced(key, 1)
        raise RuntimeError("the random state after a forward pass does not follow from the one before")

    def end_update(self, passes: int) -> None:
        """Set the state that one process has after all passes of an update."""
        if self.draws > 0:
            put_random_key(_array(_advanced(self._base, passes * self.draws)))


def _current_key() -> Key:
    return _numbers(cast("list[mx.array]", mx.random.state)[0])


def _numbers(key: mx.array) -> Key:
    high, low = cast("list[int]", key.tolist())
    return high, low


def _array(key: Key) -> mx.array:
    return mx.array(key, mx.uint32)


def _advanced(key: Key, draws: int) -> Key:
    """Return the state after a number of draws."""
    array = mx.array(key, mx.uint32)
    for _ in range(draws):
        array = mx.random.split(array)[0]
    return _numbers(array)
