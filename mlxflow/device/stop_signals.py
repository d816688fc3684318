"""A stop flag for SIGINT and SIGTERM, so that a run ends at a point from which it can continue."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StopFlag:
    """Stop flag set by SIGINT or SIGTERM.

    Attributes:
        signal: number of the signal; 0 before one.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return self.signal != 0


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Set a flag on SIGINT or SIGTERM instead of ending; a second one ends the process. In the main thread only."""
    flag = StopFlag()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: object) -> None:
        flag.signal = number
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in numbers:
        signal.signal(number, note)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def saving_if_interrupted() -> Iterator[list[Callable[[], None]]]:
    """Yield a list of functions, which are called if a signal ends the block by KeyboardInterrupt or SystemExit."""
    functions: list[Callable[[], None]] = []
    try:
        yield functions
    except (KeyboardInterrupt, SystemExit):
        for save in functions:
            save()
        raise
