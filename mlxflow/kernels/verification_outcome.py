"""What the proof of a kernel came to."""

from typing import NamedTuple


class Outcome(NamedTuple):
    """What the proof of a kernel came to.

    Attributes:
        serves: whether it is right and clearly faster.
        reason: why not, in words; empty where it serves.
        error: the largest deviation, relative to the largest number in its row; -1 where there is none.
        seconds: of a call.
        own_seconds: of MLX's own way.
    """

    serves: bool
    reason: str
    error: float = -1.0
    seconds: float = 0.0
    own_seconds: float = 0.0
