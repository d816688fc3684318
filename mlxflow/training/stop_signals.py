"""Asked to stop by Ctrl-C or SIGTERM, training ends at a point from which it can go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopFlag:
    """Whether somebody asked; called, it tells.

    Attributes:
        signal: the number of the signal that asked.
    """

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self) -> bool:
        """Return whether somebody asked."""
        return self.signal != 0


@contextmanager
def heeding_signals() -> Iterator[StopFlag]:
    """Note SIGINT and SIGTERM instead of ending by them; the second one ends as ever. Only in the main thread."""
    asked = StopFlag()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def note(number: int, frame: object) -> None:
        asked.signal = number
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in numbers:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
