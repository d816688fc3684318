"""Kill a process group when the parent of its leader ends; for systems without a parent-death signal.

    python -I -S parent_watcher.py DESCRIPTOR PID   the descriptor of a pipe that the parent holds open

It runs as a separate process, because the other two may be blocked in C code; it ends when the watched one does.
"""

import os
import select
import signal
import sys
from contextlib import suppress


def main(pipe: int, watched: int) -> None:
    """Wait until either process ends; if the parent ends first, kill the watched one.

    Args:
        pipe: descriptor of a pipe that closes when the parent ends.
        watched: id of the process to kill, leader of its group.
    """
    with suppress(ProcessLookupError):
        if starter_ends_first(pipe, watched):
            os.killpg(watched, signal.SIGKILL)


def starter_ends_first(pipe: int, watched: int) -> bool:
    """Wait until either process ends and return whether it was the parent; see `main`.

    Raises:
        ProcessLookupError: the watched process has ended already.
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
    return not any(event.filter == select.KQ_FILTER_PROC for event in events)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
