"""The current speed of the machine: a fixed piece of work that is timed in turns with a benchmark.

Between two runs of a benchmark the machine's state differs: other programs run, a processor is throttled, another
virtual machine is busy. The fixed work is the same in both runs, so a change of its time is noise between the runs.
"""

from collections.abc import Callable

import mlx.core as mx

# A product bound by arithmetic and a pass over numbers bound by memory, about ten milliseconds together
_PRODUCT = {"gpu": 4096, "cpu": 384}
_NUMBERS = {"gpu": 1 << 26, "cpu": 1 << 19}


def fixed_work() -> Callable[[], None]:
    """Return a function that keeps the default device busy for about ten milliseconds; it is warmed up."""
    kind = "cpu" if mx.default_device() == mx.cpu else "gpu"
    matrix = mx.full((_PRODUCT[kind], _PRODUCT[kind]), 0.5)
    numbers = mx.full((_NUMBERS[kind],), 0.5)
    mx.eval(matrix, numbers)

    def work() -> None:
        mx.eval(matrix @ matrix, mx.exp(numbers).sum())
        mx.synchronize()

    work()
    return work
