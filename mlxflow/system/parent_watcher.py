"""Kills a process and its group when the process that started it ends; for systems without such a signal.

    python -I -S watcher.py DESCRIPTOR PID   the descriptor is of a pipe that the starter holds open

It is a process of its own, so that it acts whatever the other two are computing, and ends when the watched one does.
"""

import os
import select
import signal
import sys
from contextlib import suppress


def main(pipe: int, watched: int) -> None:
    """Wait for the end of either process; the starter's is that of the watched one, too.

    Args:
        pipe: descriptor of a pipe that closes when the starter ends.
        watched: the process to kill, leader of its group.
    """
    with suppress(ProcessLookupError):
        if starter_ends_first(pipe, watched):
            os.killpg(watched, signal.SIGKILL)


def starter_ends_first(pipe: int, watched: int) -> bool:
    """Wait for the end of either process and return whether it is that of the starter; see `main`.

    Raises:
        ProcessLookupError: the watched one has ended.
    """
    if sys.platform == "linux":
        process = os.pidfd_open(watched)
        poll = select.poll()
        poll.register(pipe)
        poll.register(process, select.POLLIN)
        ended = {descriptor for descriptor, _ in poll.poll()}
        return pipe in ended and process not in ended
    queue, add = select.kqueue(), select.KQ_EV_ADD
    events = queue.control(
        [
            select.kevent(pipe, select.KQ_FILTER_READ, add),
            select.kevent(watched, select.KQ_FILTER_PROC, add, select.KQ_NOTE_EXIT),
        ],
        2,
    )
    return not any(event.filter == select.KQ_FILTER_PROC for event in events)  # which has an error where it is gone


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
