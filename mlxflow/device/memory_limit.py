"""MLX's memory limit, which a block may lower without changing what is allowed.

MLX's limit is a threshold: while its arrays hold more, the host waits for the device before it sends the next
operation. What was sent by then is still allocated, so that a peak is above the threshold. To keep within a limit,
MLX's must be lower.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import mlx.core as mx

_before: list[int] = []


def allowed_bytes() -> int:
    """Return the memory limit of this process: MLX's, or what it was before it was lowered."""
    return _before[0] if _before else mx.get_memory_limit()


@contextmanager
def lowered() -> Iterator[Callable[[int], None]]:
    """Yield a function that lowers MLX's limit to so many bytes until the block ends; it never raises the limit."""
    before = mx.get_memory_limit()
    _before.append(before)
    try:
        yield partial(_lower, before)
    finally:
        _before.pop()
        mx.set_memory_limit(before)


def _lower(allowed: int, threshold: int) -> None:
    mx.set_memory_limit(min(threshold, allowed))
