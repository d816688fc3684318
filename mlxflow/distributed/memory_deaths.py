"""Processes that a lack of memory ended without a message: by the kernel, or by a crash where an allocation failed.

Linux grants more memory than there is and kills a process when it is gone. Where an allocation itself fails, because
the address space is limited, MLX's CPU backend computes on a null pointer.
"""

import signal
from contextlib import suppress
from pathlib import Path

_STRICT = "2"  # of overcommit_memory: no more memory is granted than there is


class MemoryDeaths:
    """Decides which ends of child processes were due to memory, from the creation of this object on.

    Args:
        proc: the folder of the kernel's facts.
        cgroups: the folder of control groups.
    """

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._proc = proc
        self._cgroups = cgroups
        self._before = self._kills()

    def explains(self, exit_code: int) -> bool:
        """Return whether memory that ran out is the likely reason of an end.

        Args:
            exit_code: of a process of this host; negative for a signal.
        """
        if exit_code == -signal.SIGKILL:
            return self._kills() > self._before
        return exit_code in (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT) and self._allocations_may_fail()

    def _kills(self) -> int:
        """Return how often the kernel killed a process for memory: in this control group, or else on this host."""
        own = ""
        for line in _lines(self._proc / "self/cgroup"):
            if line.startswith("0::"):
                own = line[3:].strip("/")
        for file in (self._cgroups / own / "memory.events", self._proc / "vmstat"):
            for line in _lines(file):
                name, _, number = line.partition(" ")
                if name == "oom_kill":
                    return int(number)
        return 0

    def _allocations_may_fail(self) -> bool:
        import resource

        if any(
            resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
        ):
            return True
        return _lines(self._proc / "sys/vm/overcommit_memory") == [_STRICT]


def _lines(file: Path) -> list[str]:
    with suppress(OSError):
        return file.read_text().splitlines()
    return []
