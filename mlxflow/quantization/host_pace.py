"""The work of a quantization on the CPU, whatever the device is, and the pace of this CPU from a short trial."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mlxflow.device.numpy_blas import single_threaded
from mlxflow.quantization.error_compensation import MOST_THREADS, Compensation

# Width of the trials, as that of products in a factorization and a compensation; rows, those in which a compensation
# has so few products that they do not count, and the seconds that a trial takes at least
_WIDTH, _ROWS, _NARROW, _TRIAL_SECONDS = 256, 1024, 32, 0.05


class HostWork(NamedTuple):
    """Work on the CPU whatever the device is; as `HostPace`, what of it is done in a second.

    Attributes:
        factoring: floating-point operations in factorizations, of products by all threads.
        compensating: those in compensations of rounding errors, of products of one thread each.
        rounding: numbers that are rounded and compensated one by one.
    """

    factoring: float
    compensating: float
    rounding: float

    def seconds(self, pace: "HostWork") -> float:
        """Return the seconds that the work takes at a pace."""
        return sum(work / speed for work, speed in zip(self, pace, strict=True))


def host_pace() -> HostWork:
    """Return the operations and numbers that this CPU computes in a second, from three trials of a moment."""
    x = np.ones((_ROWS, _WIDTH), np.float32)
    y, result = np.ones((_WIDTH, _ROWS), np.float32), np.empty((_ROWS, _ROWS), np.float32)
    operations = 2.0 * _ROWS * _ROWS * _WIDTH

    def product() -> None:
        np.matmul(x, y, out=result)

    compensation = Compensation(np.eye(_NARROW, dtype=np.float32))
    weight, grid = np.ones((4 * _ROWS, _NARROW), np.float32), np.ones((2, 4 * _ROWS, 1), np.float32)
    factoring = operations / _seconds_of(product)
    with single_threaded() as threads:
        compensating = min(threads, MOST_THREADS) * operations / _seconds_of(product)
    return HostWork(
        factoring, compensating, weight.size / _seconds_of(lambda: compensation.applied(weight, grid, nearest=np.rint))
    )


def _seconds_of(call: Callable[[], object]) -> float:
    """Return the mean seconds of a call after the first one."""
    call()
    begin, seconds, count = time.perf_counter(), 0.0, 0
    while seconds < _TRIAL_SECONDS:
        call()
        count += 1
        seconds = time.perf_counter() - begin
    return seconds / count
