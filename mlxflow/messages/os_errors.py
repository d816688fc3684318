"""Messages for failed file calls: the file, the system's reason, and what to do about it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_ADVICE = {
    "Make room or choose another folder": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    "Let it be written or choose another folder": (errno.EROFS, errno.EACCES, errno.EPERM),
    "Move away the file or folder of this name": (
        errno.ENOTDIR,
        errno.EEXIST,
        errno.EISDIR,
        errno.ENOTEMPTY,
        errno.ELOOP,
    ),
    "Look whether its disk works, and run it again": (
        *(errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EXDEV),
        *(errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS),
    ),
    "Allow this process more open files (ulimit -n)": (errno.EMFILE,),
    "Close files of other programs, and run it again": (errno.ENFILE,),
    "Put it there, or name another": (errno.ENOENT,),
    "Choose a shorter name": (errno.ENAMETOOLONG,),
    "Run it again": (errno.EINTR, errno.EAGAIN, errno.ENOMEM),
}

_ADVICE_BY_NUMBER = {number: advice for advice, numbers in _ADVICE.items() for number in numbers}

# Errors whose cause is the machine or a limit, not the file
_OF_MACHINE = frozenset(
    {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EINTR, errno.EAGAIN}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOLCK, errno.ENOSPC, errno.EDQUOT}
)

#: Raised for a file that does not exist; other errors do not say whether it exists.
ABSENT = (FileNotFoundError, NotADirectoryError)

#: Errors that only writing calls raise.
OF_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


def is_about_a_file(error: OSError) -> bool:
    """Return whether an error comes from the file system, not from a process or a network."""
    return error.errno in _ADVICE_BY_NUMBER


def advise(error: OSError) -> str:
    """Return what to do about an error, without a full stop."""
    return _ADVICE_BY_NUMBER.get(error.errno or 0, "Fix that, and run it again")


def advise_on(error: Exception, otherwise: str) -> str:
    """Return what to do about something that cannot be used, without a full stop.

    Args:
        error: raised by using it.
        otherwise: the advice if the cause is the thing itself, not the machine or a limit.
    """
    return advise(error) if isinstance(error, OSError) and error.errno in _OF_MACHINE else otherwise


def cause_message(error: OSError, place: str | os.PathLike[str]) -> str:
    """Return the message for a failed file call.

    Args:
        error: raised by it.
        place: the file or folder, used if the error names none.
    """
    return f"{named(error, place)}: {error.strerror or error}. {advise(error)}."


def reason_of(error: Exception) -> str:
    """Return why something cannot be read, without the file's name: the system's reason if there is one."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def named(error: OSError, place: str | os.PathLike[str]) -> str:
    """Return the file that an error names, or else a place."""
    name = error.filename2 or error.filename  # of two names, the one being written
    return os.fsdecode(place if name is None or isinstance(name, int) else name)


@contextmanager
def naming(place: str | os.PathLike[str]) -> Iterator[None]:
    """Add a file name to the errors of this block that have none, such as those of read, write and flush."""
    try:
        yield
    except OSError as error:
        if error.filename is None or isinstance(error.filename, int):
            error.filename = os.fspath(place)
        raise
