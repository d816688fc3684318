"""Starts the verifier process before the wanted kernels are known: loading MLX and waking the GPU takes a while.

Imports no mlx: it may run before this process has loaded it.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mlxflow.device.compute_device import may_have_gpu
from mlxflow.storage.locks import LockedError, device_lock, hold

if TYPE_CHECKING:
    from mlxflow.kernels.verifier_process import VerifierProcess

#: Reads the names of kernels from its input and verifies them.
COMMAND = (sys.executable, "-P", "-m", "mlxflow.kernels.verification", "-")

#: Printed while another process verifies.
WAITING = "process {holder} is verifying the GPU kernels; waiting for it"


def cache_file() -> Path:
    """Return the file of verification results, in the user's cache folder."""
    return device_lock().with_name("kernels.json")


def lock_file() -> Path:
    """Return the lock that the verifying process holds."""
    return cache_file().with_name("kernels.lock")


class EarlyVerifier(ExitStack):
    """Holds a verifier process and the lock for it until the block ends.

    Attributes:
        process: the process; None if none is needed or another one verifies.
    """

    process: "VerifierProcess | None" = None

    def start(self, command: Sequence[str], is_wanted: Callable[[], bool]) -> None:
        """Start the process, unless another one verifies.

        Args:
            command: see `verifier_process.Verifier`.
            is_wanted: called once the lock is held; the process starts if it returns True.
        """
        from mlxflow.kernels import verifier_process

        with ExitStack() as held:
            try:
                held.enter_context(hold(lock_file(), WAITING, wait=False))
            except LockedError:
                return
            if is_wanted():
                self.process = held.enter_context(verifier_process.VerifierProcess(command))
                self.push(held.pop_all())

    def stop(self) -> None:
        """End the process if there is one."""
        self.process = None
        self.close()


def begin_early(command: Sequence[str] = COMMAND) -> EarlyVerifier:
    """Start the process if no results are cached and there may be a GPU; does not need MLX.

    Args:
        command: see `verifier_process.Verifier`.
    """
    ahead = EarlyVerifier()
    if may_have_gpu() and not cache_file().exists():
        ahead.start(command, lambda: not cache_file().exists())
    return ahead
