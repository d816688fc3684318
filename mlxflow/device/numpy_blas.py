"""The number of threads of NumPy's BLAS, which is not the one that MLX's CPU backend uses.

NumPy's wheels for Linux bring an OpenBLAS of their own, whose functions have a prefix and a suffix. Its threads wait
for each other in loops: on a machine with other work a small product by two threads may take ten times as long as by
one.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

# Names of OpenBLAS's functions in NumPy's wheels, and in a NumPy that was built with a system's library
_NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")


@contextmanager
def single_threaded() -> Iterator[int]:
    """Let NumPy's products use one thread each, so that several threads may compute them side by side.

    Yields:
        How many threads a product had before; 1 if NumPy's BLAS is another one, which is left as it is.
    """
    functions = _functions()
    if functions is None:
        yield 1
        return
    get, set_ = functions
    before = int(get())
    set_(1)
    try:
        yield before
    finally:
        set_(before)


@cache
def _functions() -> tuple[Any, Any] | None:
    """Return the functions that return and set the number of threads; None if there are none."""
    try:
        library = ctypes.CDLL(np._core._multiarray_umath.__file__)  # type: ignore[attr-defined]  # and what it links
    except (AttributeError, OSError):
        return None
    for name in _NAMES:
        get, set_ = (getattr(library, name.format(verb), None) for verb in ("get", "set"))
        if get is not None and set_ is not None:
            return get, set_
    return None
