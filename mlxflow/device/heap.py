"""glibc's heaps: limit their number, and return freed memory to the system. No effect with other C libraries."""

import ctypes
from contextlib import suppress

_ARENA_MAX = -8


def share_one() -> None:
    """Make all threads share one heap; glibc never returns the heaps of single threads."""
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def trim() -> None:
    """Return free memory of every heap to the system; use it after a phase with many small objects."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
