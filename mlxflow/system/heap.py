"""glibc's heaps: how many threads have one of their own, and when freed memory goes back to the system.

Other C libraries have none of these calls; there, nothing is done.
"""

import ctypes
from contextlib import suppress

_ARENA_MAX = -8


def share_one() -> None:
    """Keep glibc from giving each thread a heap of its own, none of which it ever returns."""
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def trim() -> None:
    """Give what is free in every heap back to the system; a phase that made many small objects leaves it fragmented."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
