import errno
import os
from collections.abc import Callable

import pytest

from mlxflow.device.memory_errors import OutOfMemoryError
from mlxflow.distributed.heartbeat import Failure, read_message
from mlxflow.distributed.rank import ALONE, Rank
from mlxflow.distributed.rank_failures import reported
from mlxflow.distributed.team import JoinError
from mlxflow.messages.errors import StageError, WorkflowError


def _raise(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "failure", "raised"),
    [
        (WorkflowError("a", "b"), Failure("refused", ("a", "b"), 2), SystemExit),
        (StageError("a"), Failure("refused", ("a",), 1), SystemExit),
        (OutOfMemoryError("a"), Failure("memory", ("a",), 1), SystemExit),
        (ValueError("odd\nnumber"), Failure("error", ("ValueError: odd number",), 1), ValueError),
        (
            ModuleNotFoundError("No module named 'x'"),
            Failure("refused", ("train: ModuleNotFoundError: No module named 'x'. Install it again.",), 1),
            SystemExit,
        ),
        (
            RuntimeError("[ring] connection to a peer was lost"),
            Failure("peer", ("RuntimeError: [ring] connection to a peer was lost",), 1),
            SystemExit,
        ),
        (JoinError("[ring] bind"), Failure("join", ("JoinError: [ring] bind",), 1), SystemExit),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            Failure("refused", ("x: cannot be written (No space left on device). Free some space",), 1),
            SystemExit,
        ),
    ],
)
def test_a_rank_reports_why_it_ends(error: Exception, failure: Failure, raised: type[BaseException]) -> None:
    reading, writing = os.pipe()
    with pytest.raises(raised), reported(Rank(1, 2, "ring", "ordered", writing), "train"):
        _raise(error)()
    os.close(writing)
    (line,) = os.read(reading, 1 << 16).splitlines()
    os.close(reading)
    found = read_message(line)
    assert isinstance(found, Failure)
    assert found[::2] == failure[::2]
    if failure.kind != "refused" or isinstance(error, WorkflowError | ImportError):
        assert found == failure


def test_the_exceptions_of_a_single_process_pass() -> None:
    with pytest.raises(StageError), reported(ALONE, "train"):
        _raise(StageError("a"))()
