"""A pseudorandom permutation of row numbers that can be evaluated at any position without storing it.

A Feistel network over the smallest even number of bits that holds the count, walked until it falls within the count
(cycle walking): Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002. Four rounds, each mixed as
in splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROUNDS = 4


class Permutation:
    """A permutation of the numbers from 0 to count - 1, determined by seed and epoch.

    Args:
        count: of numbers, at least 1.
        seed: of all epochs.
        epoch: each has another permutation.
    """

    def __init__(self, count: int, *, seed: int, epoch: int) -> None:
        self._count = count
        self._half = np.uint64(max(1, (max(1, count - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)

    def __call__(self, places: "NDArray[np.int64]") -> "NDArray[np.int64]":
        """Return the numbers at the given positions, each from 0 to count - 1, in constant time per position."""
        numbers = self._step(places.astype(np.uint64))
        while (outside := numbers >= self._count).any():
            numbers[outside] = self._step(numbers[outside])
        return numbers.astype(np.int64)

    def _step(self, values: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        mixed: NDArray[np.uint64] = (left << self._half) | right
        return mixed


def _mix(values: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
