"""Out of memory: recognize MLX's errors, and find out what they are about.

On CUDA an allocation fails while an operation is sent to the device: what was computed before is good. The CPU backend
of MLX 0.32 does not notice a failed allocation and crashes.
On Metal a whole command buffer fails while it runs, and the error is raised by any later call that waits or sends:
until then arrays of that command buffer hold anything. After it was raised MLX works as before.
So what such an error is about must be known before work is repeated: wait for everything older first, with `settle`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mlxflow.messages.byte_sizes import show_bytes
from mlxflow.messages.errors import StageError

_OUT_OF_MEMORY = re.compile(
    r"malloc|unable to allocate|out ?of ?memory|attempting to allocate|insufficient memory", re.IGNORECASE
)


class OutOfMemoryError(StageError):
    """The device ran out of memory in a stage."""


def out_of_memory_bytes(error: RuntimeError) -> int | None:
    """Return the bytes of the allocation that failed, 0 if MLX names no number; None if the error is another one."""
    message = str(error)
    if not _OUT_OF_MEMORY.search(message):
        return None
    number = re.search(r"(\d+) bytes", message)
    return int(number[1]) if number else 0


def is_late(error: RuntimeError) -> bool:
    """Return whether an error may be about work that was sent to the device before the call that raised it."""
    return "command buffer" in str(error).lower()


def settle(*, drops: bool = False) -> None:
    """Wait for all work on the default device; late errors are raised here.

    Args:
        drops: the unfinished work was given up because it ran out of memory, and further errors of that kind are its.

    Raises:
        RuntimeError: the work failed.
    """
    import mlx.core as mx

    try:
        mx.synchronize()
    except RuntimeError as error:
        if not drops or out_of_memory_bytes(error) is None:
            raise


def shortage(needed_bytes: int, limit_bytes: int) -> str:
    """Return that the memory did not suffice, in words.

    Args:
        needed_bytes: of the allocation that failed; 0 if not known.
        limit_bytes: the memory limit.
    """
    more = f"{show_bytes(needed_bytes)} more needed, " if needed_bytes else ""
    return f"out of memory: {more}memory limit {show_bytes(limit_bytes)}"


def describe(error: RuntimeError, subject: str) -> str | None:
    """Return the line about an error that ended a stage or a command; None if it is not about memory.

    Args:
        error: raised by MLX.
        subject: the stage or the command.
    """
    needed = out_of_memory_bytes(error)
    if needed is None:
        return None
    from mlxflow.device import memory_limit

    return (
        f"{subject}: {shortage(needed, memory_limit.allowed_bytes())}. "
        "Close other programs, or use a smaller batch_size or model, and run it again."
    )


@contextmanager
def naming(task: str) -> Iterator[None]:
    """Wait for the device at the end of a stage, and make errors about memory one line.

    What the stage wrote may be the result of work that failed, and whose error no call has raised yet.

    Raises:
        OutOfMemoryError: the device ran out of memory.
    """
    try:
        yield
        settle()
    except RuntimeError as error:
        if (line := describe(error, task)) is None:
            raise
        raise OutOfMemoryError(line) from error
