"""The process that proves kernels, started before it is known which, or whether: what it needs takes a while.

Imports no mlx: it may be started before this process has.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mlxflow.device.compute_device import may_have_gpu
from mlxflow.storage.locks import LockedError, device_lock, hold

if TYPE_CHECKING:
    from mlxflow.kernels.verifier_process import Prover

#: Reads the names of kernels, and proves them.
COMMAND = (sys.executable, "-P", "-m", "mlxflow.kernels.verification", "-")

#: Said where another process proves.
WAITING = "process {holder} is proving the GPU kernels; waiting for it"


def cache_file() -> Path:
    """Return where outcomes are kept: in the user's cache folder."""
    return device_lock().with_name("kernels.json")


def lock_file() -> Path:
    """Return what is locked by whoever proves."""
    return cache_file().with_name("kernels.lock")


class Ahead(ExitStack):
    """Holds a process that will prove kernels, and the lock for it, until it has, or until the block ends.

    Attributes:
        prover: the process; None where none is needed or another process proves.
    """

    prover: "Prover | None" = None

    def start(self, command: Sequence[str], is_wanted: Callable[[], bool]) -> None:
        """Start the process, unless another one proves.

        Args:
            command: see `choice.prove_all`.
            is_wanted: asked when it is sure that no other does.
        """
        from mlxflow.kernels import verifier_process

        with ExitStack() as held:
            try:
                held.enter_context(hold(lock_file(), WAITING, wait=False))
            except LockedError:
                return
            if is_wanted():
                self.prover = held.enter_context(verifier_process.Prover(command))
                self.push(held.pop_all())

    def stop(self) -> None:
        """End the process, where there is one."""
        self.prover = None
        self.close()


def begin_early(command: Sequence[str] = COMMAND) -> Ahead:
    """Start the process where nothing was ever proved and there may be a GPU; MLX need not be imported for that.

    Args:
        command: see `choice.prove_all`.
    """
    ahead = Ahead()
    if may_have_gpu() and not cache_file().exists():
        ahead.start(command, lambda: not cache_file().exists())
    return ahead
