"""One layer with another method for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn


@contextmanager
def replaced(
    module: nn.Module, method: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Give one layer another method until the block ends.

    Python looks special methods up in the class, so the layer becomes of a class of its own. That class is garbage in
    a cycle afterwards: what its method closes over lives until the next collection, so keep no arrays there.

    Args:
        module: that layer; others of its class keep theirs.
        method: its name, such as `__call__`.
        make: takes the method and returns the one to use; both take the layer first.
    """
    kind: Any = type(module)
    module.__class__ = type(kind.__name__, (kind,), {method: make(getattr(kind, method))})
    try:
        yield
    finally:
        module.__class__ = kind
