"""How fast the machine is at the moment: a fixed piece of work, timed in turns with what is measured.

Two runs of a benchmark meet a machine in two states: another program computes, a processor is throttled, a virtual
machine's neighbour is busy. The fixed work is the same in both, so that its change is noise between the runs.
"""

from collections.abc import Callable

import mlx.core as mx

# A product bound by arithmetic and a pass over numbers bound by memory, some ten milliseconds together
_PRODUCT = {"gpu": 4096, "cpu": 384}
_NUMBERS = {"gpu": 1 << 26, "cpu": 1 << 19}


def fixed_work() -> Callable[[], None]:
    """Return a piece of work that takes the default device some ten milliseconds, with nothing left to compile."""
    kind = "cpu" if mx.default_device() == mx.cpu else "gpu"
    matrix = mx.full((_PRODUCT[kind], _PRODUCT[kind]), 0.5)
    numbers = mx.full((_NUMBERS[kind],), 0.5)
    mx.eval(matrix, numbers)

    def work() -> None:
        mx.eval(matrix @ matrix, mx.exp(numbers).sum())
        mx.synchronize()

    work()
    return work
