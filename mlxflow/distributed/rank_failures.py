"""Reports of a rank to its supervisor why it ends."""

from collections.abc import Iterator
from contextlib import contextmanager

from mlxflow.device.memory_errors import OutOfMemoryError
from mlxflow.distributed.heartbeat import Heart, Kind
from mlxflow.distributed.number_exchange import LOST
from mlxflow.distributed.rank import Rank
from mlxflow.messages.errors import MlxflowError, reason_of
from mlxflow.messages.os_errors import cause_message, is_about_a_file

# How errors of MLX's backends begin: the connection to a peer was lost
_BACKENDS = ("[ring]", "[nccl]", "[mpi]", "[jaccl]", LOST)


@contextmanager
def reported(rank: Rank, task: str) -> Iterator[None]:
    """Report an exception that ends the block to the supervisor, which prints it.

    Args:
        rank: the place of this process; of a single process, exceptions pass unchanged.
        task: the stage, for messages.

    Raises:
        SystemExit: instead of an exception that the supervisor prints; an unexpected one is raised on.
    """
    if rank.size == 1:
        yield
        return
    heart = Heart(rank.beats)
    try:
        yield
    except MlxflowError as error:
        heart.fail("memory" if isinstance(error, OutOfMemoryError) else "refused", str(error), error.exit_code)
        raise SystemExit(error.exit_code) from error
    except ImportError as error:  # another start would fail in the same way
        heart.fail("refused", f"{task}: {type(error).__name__}: {reason_of(error)}. Install it again.", 1)
        raise SystemExit(1) from error
    except OSError as error:
        if not is_about_a_file(error):
            raise
        heart.fail("refused", cause_message(error, task), 1)
        raise SystemExit(1) from error
    except Exception as error:
        kind = _kind_of(error)
        heart.fail(kind, f"{type(error).__name__}: {reason_of(error)}", 1)
        if kind == "error":
            raise
        raise SystemExit(1) from error


def _kind_of(error: Exception) -> Kind:
    from mlxflow.distributed.team import JoinError

    if isinstance(error, JoinError):
        return "join"
    return "peer" if isinstance(error, RuntimeError) and str(error).startswith(_BACKENDS) else "error"
