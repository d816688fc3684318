"""How long a measurement may take, and what it says meanwhile."""

import time
from collections.abc import Callable

from mlxflow.system import terminal

# Between two lines about one piece of work
_SECONDS_BETWEEN_LINES = 10.0
# What takes less begins without a word
_WORTH_A_LINE_SECONDS = 5.0


class Budget:
    """Seconds for several pieces of work; what one leaves is there for the next.

    Args:
        seconds: for all of them; 0: as long as it takes.
        task: stands before each line.
        clock: tells the seconds.
        say: takes a line.
    """

    def __init__(
        self,
        seconds: float,
        *,
        task: str,
        clock: Callable[[], float] = time.perf_counter,
        say: Callable[[str], None] = terminal.say,
    ) -> None:
        self.seconds = seconds
        self._task = task
        self._clock = clock
        self._say_line = say
        self._begin = clock()
        self._end = self._begin + seconds if seconds else float("inf")
        self._part_end = self._end
        self._said = self._begin

    def begin(self, share: float) -> None:
        """Begin a piece of work that should be done when so much of all seconds is over."""
        if self.seconds:
            self._part_end = max(self._clock(), min(self._end, self._begin + share * self.seconds))

    @property
    def left(self) -> float:
        """Seconds that this piece of work still has; infinite without a bound."""
        return max(0.0, self._part_end - self._clock())

    @property
    def is_over(self) -> bool:
        """Whether this piece of work has no time left."""
        return self.left <= 0

    def announce(self, what: str, seconds: float) -> None:
        """Say what begins and how long it takes: the estimate, or what is left where that is less."""
        about = f"about {seconds:,.0f} s"
        if seconds > self.left:
            about += f", of which max_seconds = {self.seconds:g} leaves {self.left:,.0f} s"
        elif seconds < _WORTH_A_LINE_SECONDS:
            return
        self._say_line(f"{self._task}: {what}: {about}")
        self._said = self._clock()

    def progress(self, what: str, done: int, of: int, seconds: float) -> None:
        """Say how far a piece of work is, at most every ten seconds.

        Args:
            what: is done.
            done: of its parts.
            of: parts in all.
            seconds: that the parts done took.
        """
        if self._clock() - self._said < _SECONDS_BETWEEN_LINES or done >= of or self.is_over:
            return
        self._said = self._clock()
        left = min(self.left, seconds / max(1, done) * (of - done))
        self._say_line(f"{self._task}: {what} {done} of {of}, {left:,.0f} s left")
