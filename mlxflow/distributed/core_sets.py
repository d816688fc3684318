"""Processors for the ranks of one host: a set for each, so that they keep their caches. Imports no MLX."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def core_sets(ranks: int, threads: int) -> list[tuple[int, ...]]:
    """Return a set of processors for each rank, disjoint and of equal size; empty sets where they do not fit.

    Args:
        ranks: on this host.
        threads: of matrix products of each rank; 0 for as many as there are processors, which fits no second rank.
    """
    everywhere: list[tuple[int, ...]] = [()] * ranks
    if sys.platform != "linux" or not threads:
        return everywhere
    return divided(in_order_of_cores(sorted(os.sched_getaffinity(0))), ranks, threads) or everywhere


def divided(processors: Sequence[int], ranks: int, threads: int) -> list[tuple[int, ...]]:
    """Return the processors in parts of equal size, one for each rank; empty if a part had fewer than the threads.

    Args:
        processors: in an order in which neighbours share caches.
        ranks: number of parts.
        threads: the smallest part.
    """
    size = len(processors) // ranks
    if ranks == 1 or size < threads:
        return []
    return [tuple(sorted(processors[rank * size : (rank + 1) * size])) for rank in range(ranks)]


def in_order_of_cores(processors: Sequence[int], topology: Path = _TOPOLOGY) -> list[int]:
    """Return processors in the order of their packages and cores: those that share a core are neighbours.

    Args:
        processors: their numbers.
        topology: the folder in which Linux describes them.
    """

    def place(processor: int) -> tuple[int, int, int]:
        with suppress(OSError, ValueError):
            folder = topology / f"cpu{processor}" / "topology"
            package, core = (int((folder / name).read_text()) for name in ("physical_package_id", "core_id"))
            return package, core, processor
        return 0, processor, processor

    return sorted(processors, key=place)
