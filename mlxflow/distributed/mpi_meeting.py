"""The ranks of the backend mpi: `mpirun` is where they meet, and the supervisor still starts and watches them itself.

`mpirun` assigns each process that it starts a slot of the group by environment variables, and an MPI library joins the
group by them. So `mpirun` starts small processes, `mlxflow.distributed.mpi_slot`, and the ranks get their variables. On
other hosts it starts them through ssh. Tried with Open MPI 4.1 and 5.0 on one host, and with 4.1 through ssh.
"""

import ctypes.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from mlxflow.distributed import mpi_slot
from mlxflow.distributed.ssh_link import StopRequestedError
from mlxflow.messages.errors import WorkflowError

_START_SECONDS, _END_SECONDS, _TICK_SECONDS = 60.0, 5.0, 0.1
_LIBRARY = "MLX_MPI_LIBNAME"


class MpiHost(NamedTuple):
    """Where a rank runs.

    Attributes:
        name: to which ssh connects; "localhost" for this host.
        python: the interpreter there.
        address: of this host, to which processes there connect.
    """

    name: str = "localhost"
    python: str = sys.executable
    address: str = "127.0.0.1"


class MpiMeeting:
    """A group of Open MPI without its ranks; a context, which ends the group.

    Args:
        hosts: of the ranks.
        stop_requested: whether to give up.

    Attributes:
        variables: of each rank.

    Raises:
        StopRequestedError: a stop was requested.
        WorkflowError: `mpirun` cannot form the group.
    """

    def __init__(self, hosts: Sequence[MpiHost], stop_requested: Callable[[], bool]) -> None:
        self._names = [host.name for host in hosts]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close
        self._links: dict[int, socket.socket] = {}
        self.variables: list[dict[str, str]] = []
        key = secrets.token_hex(16)
        address = hosts[0].address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family) as server:
            server.settimeout(_TICK_SECONDS)
            environment = os.environ | {mpi_slot.VARIABLE: f"{address} {server.getsockname()[1]} {key}"}
            if os.geteuid() == 0:  # mpirun refuses root without them
                environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            quiet = subprocess.DEVNULL
            self._process = subprocess.Popen(
                _command(hosts), stdin=quiet, stdout=quiet, stderr=self._errors, env=environment, start_new_session=True
            )
            try:
                found = self._accept(server, key, stop_requested)
            except BaseException:
                self.close()
                raise
        library = {_LIBRARY: name} if (name := _library()) else {}
        self.variables = [found[number] | library for number in range(len(hosts))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self, server: socket.socket, key: str, stop_requested: Callable[[], bool]) -> dict[int, dict[str, str]]:
        """Return the variables of each rank's slot."""
        size = len(self._names)
        found: dict[int, dict[str, str]] = {}
        until = time.monotonic() + _START_SECONDS
        while len(found) < size:
            if stop_requested():
                raise StopRequestedError
            if self._process.poll() is not None or time.monotonic() > until:
                test = f"-host {','.join(dict.fromkeys(self._names))}" if len(set(self._names)) > 1 else "-np 2"
                raise WorkflowError(
                    f'workflow.distributed.backend = "mpi": mpirun formed no group of {size} ranks{self._complaint()}. '
                    f'Run "mpirun {test} hostname" to see why, or use backend = "ring".'
                )
            with suppress(TimeoutError, ValueError, OSError):
                link = server.accept()[0]
                link.settimeout(_START_SECONDS)
                given, variables = json.loads(link.makefile().readline())
                if given == key:
                    number = int(variables["PMIX_RANK"])
                    found[number], self._links[number] = variables, link
        return found

    def _complaint(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines()]
        words = [line for line in lines if line.strip("-")]
        return f' ("{words[0][:200]}")' if words else ""

    def close(self) -> None:
        """End the group: its processes end with their connections, and `mpirun` with them."""
        for link in self._links.values():
            link.close()
        for end in (None, self._process.terminate, self._process.kill):
            if end:
                end()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
                break
        self._errors.close()


def _command(hosts: Sequence[MpiHost]) -> list[str]:
    """Return the call of `mpirun` that starts the slot of each rank; its absolute path is taken on other hosts, too."""
    # the supervisor assigns the processors, and ranks that wait must not keep others from running
    command = [shutil.which("mpirun") or "mpirun", "--oversubscribe", "--bind-to", "none"]
    text = Path(mpi_slot.__file__).read_text(encoding="utf-8")
    for number, host in enumerate(hosts):
        command += [":"] if number else []
        command += ["-np", "1", "-host", f"{host.name}:1", "-x", mpi_slot.VARIABLE, host.python, "-I", "-S", "-c", text]
    return command


def require_mpirun() -> None:
    """Check that there is an `mpirun`.

    Raises:
        WorkflowError: there is none.
    """
    if shutil.which("mpirun") is None:
        raise WorkflowError(
            'workflow.distributed.backend = "mpi": there is no mpirun in the PATH. Install Open MPI, or use '
            'backend = "ring".'
        )


def _library() -> str | None:
    """Return the name by which MLX finds the library of `mpirun`; None for MLX's own."""
    if name := os.environ.get(_LIBRARY):
        return name
    suffix = "dylib" if sys.platform == "darwin" else "so"
    beside = Path(shutil.which("mpirun") or "/").resolve().parent.parent / "lib" / f"libmpi.{suffix}"
    return str(beside) if beside.exists() else ctypes.util.find_library("mpi")
