"""Flush written files to the disk.

`fsync` hands a file's data to the drive. On macOS they may then lie in the drive's cache, which a power failure loses;
`F_FULLFSYNC` empties that cache for all files at once and takes 5 to 50 ms. So several files are flushed one by one
with `fsync`, and then the drive once.
"""

import fcntl
import os
from contextlib import suppress


def flush(descriptor: int) -> None:
    """Hand the data of a file or folder to the drive."""
    os.fsync(descriptor)


def flush_drive(descriptor: int) -> None:
    """Hand a file's data to the drive and, on macOS, empty the drive's cache: also of files that were flushed before.

    A file system without that call is flushed like any other.
    """
    os.fsync(descriptor)
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):
            fcntl.fcntl(descriptor, full)
