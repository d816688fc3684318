"""Keep and restore the random state of MLX, which is a key."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx


def put_random_key(key: mx.array) -> None:
    """Set MLX's random state to a key, (2,), such as `mx.random.state` holds."""
    high, low = cast("list[int]", key.tolist())
    mx.random.seed((high << 32) | low)  # MLX makes a key from the two halves of a seed


@contextmanager
def same_random_state() -> Iterator[None]:
    """Restore MLX's random state when the block ends."""
    (key,) = cast("Any", mx.random.state)
    try:
        yield
    finally:
        put_random_key(key)
