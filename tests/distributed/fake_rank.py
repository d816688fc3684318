"""A rank of a test of the supervisor: it does what its script says, without MLX."""

import os
import signal
import sys
import time
from pathlib import Path

from mlxflow.distributed.heartbeat import Heart
from mlxflow.distributed.rank import of_this_process

rank = of_this_process()
heart = Heart(rank.beats)
script = sys.stdin.read().split(";")


def end(number: int, frame: object) -> None:
    """End as a rank that has saved its checkpoint."""
    print("saved", flush=True)
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, end)
is_again, rows = False, 0
for line in script:
    number, _, action = line.strip().partition(" ")
    if number not in ("all", str(rank.number)) or (is_again and number != "all"):
        continue
    verb, _, rest = action.partition(" ")
    if verb == "beat":
        step, _, doing = rest.partition(" ")
        heart.beat(int(step), doing, batch_size=rows)
    elif verb == "wait":
        step, _, doing = rest.partition(" ")
        heart.beat(int(step), doing, waits=True)
    elif verb == "done":
        heart.beat(9, "after the training", is_done=True)
    elif verb == "rows":  # of its forward passes from now on: fewer than those that ran out of memory
        rows = min(int(rest), rank.too_many_rows - 1) if rank.too_many_rows else int(rest)
    elif verb == "need":  # fails where it has more rows
        if rows > int(rest):
            heart.fail("memory", "train: out of memory: 12 more bytes needed.", 1)
            sys.exit(1)
    elif verb == "print":
        print(rest, flush=True)
    elif verb == "fail":
        kind, code, message = rest.split(" ", 2)
        heart.fail(kind, message, int(code))  # type: ignore[arg-type]
        sys.exit(int(code))
    elif verb == "hang":  # says why it ends, and does not
        heart.fail("error", rest, 1)
        time.sleep(600)
    elif verb == "exit":
        sys.exit(int(rest))
    elif verb == "sleep":
        time.sleep(float(rest))
    elif verb == "once":  # what follows for this rank alone is done in the first start only
        try:
            Path(rest).touch(exist_ok=False)
        except FileExistsError:
            is_again = True
    elif verb == "touch":
        Path(rest).touch()
    elif verb == "until":  # another rank has touched a file
        while not Path(rest).exists():
            time.sleep(0.01)
    elif verb == "signal":
        os.kill(os.getppid(), getattr(signal, rest))
    elif verb == "kill":
        os.kill(os.getpid(), getattr(signal, rest))
