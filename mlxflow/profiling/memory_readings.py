"""Memory readings of MLX, the process, the system and the device.

MLX's counters cost a fraction of a microsecond, the resident set some ten microseconds, the proportional and unique
sets a millisecond or more. A `Reader` therefore reads the latter two and the system's figures at most once a second,
less often if that would take more than a thousandth of the time, and repeats their last values in between.
"""

import ctypes
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import psutil

_SLOW_EVERY_SECONDS = 1.0
_SLOW_SHARE = 1e-3  # of the time, at most

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_FOOTPRINT_AT = 16 + 7 * 8  # in rusage_info_v0: a uuid, then ri_phys_footprint as the eighth 64-bit number


class MemoryReading(NamedTuple):
    """One reading of the memory, in bytes except for time and pressure; 0 where the system has no such figure.

    Attributes:
        seconds: since the reader was made.
        active_memory_bytes: held by MLX arrays.
        peak_memory_bytes: peak of the active memory since the last reset, at least the active memory.
        cache_memory_bytes: freed buffers that MLX keeps for reuse.
        rss_bytes: the resident set of the process.
        available_bytes: memory that the system could still allocate.
        footprint_bytes: macOS's physical footprint, Linux's proportional set (PSS).
        unique_bytes: memory that would be freed if the process ended (Linux, USS).
        swap_bytes: the system's swap in use.
        pressure: memory pressure in percent: share of the last 10 s in which some process waited for memory (Linux);
            0, 50 or 100 for normal, warning and critical (macOS).
        device_bytes: an NVIDIA GPU's memory in use by all processes; 0 if the device has no memory of its own.
    """

    seconds: float
    active_memory_bytes: int
    peak_memory_bytes: int
    cache_memory_bytes: int
    rss_bytes: int
    available_bytes: int
    footprint_bytes: int
    unique_bytes: int
    swap_bytes: int
    pressure: float
    device_bytes: int


class _Slow(NamedTuple):
    """The figures that are too expensive to read each time."""

    available_bytes: int
    footprint_bytes: int
    unique_bytes: int
    swap_bytes: int
    pressure: float
    device_bytes: int


class Limits(NamedTuple):
    """MLX's memory limits, in bytes.

    Attributes:
        memory: held by arrays, above which the host waits for the device.
        cache: of freed buffers kept for reuse.
    """

    memory: int
    cache: int


def read_limits() -> Limits:
    """Return MLX's limits. MLX returns a limit only when it is set: each is raised and restored."""
    very_large = 1 << 62
    memory = mx.set_memory_limit(very_large)
    mx.set_memory_limit(memory)
    cache = mx.set_cache_limit(very_large)
    mx.set_cache_limit(cache)
    return Limits(memory, cache)


class Reader:
    """Takes readings of this process; safe to use from several threads."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._process = psutil.Process()
        self._statm = _open("/proc/self/statm")
        self._device = device_memory() if mx.default_device() != mx.cpu else lambda: 0
        self._slow = self._read_slow()
        self._slow_due = 0.0

    def close(self) -> None:
        """Close open files; readings can still be taken."""
        if self._statm >= 0:
            descriptor, self._statm = self._statm, -1
            os.close(descriptor)

    def read(self, *, fresh: bool) -> MemoryReading:
        """Return a reading.

        Args:
            fresh: read the expensive figures, too, instead of repeating their last values.
        """
        now = time.perf_counter()
        if fresh or now >= self._slow_due:
            self._slow = self._read_slow()
            took = time.perf_counter() - now
            self._slow_due = now + max(_SLOW_EVERY_SECONDS, took / _SLOW_SHARE)
        slow = self._slow
        active = mx.get_active_memory()
        return MemoryReading(
            now - self._begin,
            active,
            max(active, mx.get_peak_memory()),  # a reset sets MLX's peak to 0, not to the active memory
            mx.get_cache_memory(),
            self._rss(),
            slow.available_bytes,
            slow.footprint_bytes,
            slow.unique_bytes,
            slow.swap_bytes,
            slow.pressure,
            slow.device_bytes,
        )

    def _rss(self) -> int:
        if self._statm >= 0:
            return int(os.pread(self._statm, 256, 0).split()[1]) * _PAGE_BYTES
        return int(self._process.memory_info().rss)

    def _read_slow(self) -> _Slow:
        footprint, unique = (mac_footprint(), 0) if sys.platform == "darwin" else linux_sets(_read("smaps_rollup"))
        return _Slow(
            int(psutil.virtual_memory().available),
            footprint,
            unique,
            int(psutil.swap_memory().used),
            _mac_pressure() if sys.platform == "darwin" else _linux_pressure(),
            self._device(),
        )


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _read(name: str) -> str:
    try:
        return Path("/proc/self", name).read_text()
    except OSError:
        return ""


def linux_sets(rollup: str) -> tuple[int, int]:
    """Return the proportional and the unique set in bytes, from the text of `/proc/self/smaps_rollup`."""
    sizes: dict[str, int] = {}
    for line in rollup.splitlines():
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            sizes[name] = int(value[:-2]) * 1024
    return sizes.get("Pss", 0), sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)


class _DeviceMemory(ctypes.Structure):
    """NVML's nvmlMemory_t, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def device_memory(library: str = "libnvidia-ml.so.1") -> Callable[[], int]:
    """Return a function that returns the memory in use of the first GPU in bytes, from NVIDIA's NVML.

    Args:
        library: file name of NVML; if it is missing or finds no GPU, the function returns 0.
    """
    handle = ctypes.c_void_p()
    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
            return lambda: 0
        ask = nvml.nvmlDeviceGetMemoryInfo
    except (OSError, AttributeError):
        return lambda: 0

    def used() -> int:
        memory = _DeviceMemory()
        return 0 if ask(handle, ctypes.byref(memory)) else int(memory.used)

    return used


def _linux_pressure() -> float:
    try:
        text = Path("/proc/pressure/memory").read_text()
        return float(text.partition("avg10=")[2].partition(" ")[0])
    except (OSError, ValueError):
        return 0.0


def mac_footprint() -> int:
    """Return this process's physical footprint in bytes, as Activity Monitor shows it: `ri_phys_footprint` (macOS)."""
    buffer = ctypes.create_string_buffer(512)
    failed = ctypes.CDLL(None).proc_pid_rusage(os.getpid(), 0, ctypes.byref(buffer))
    return 0 if failed else int(struct.unpack_from("=Q", buffer, _FOOTPRINT_AT)[0])


def _mac_pressure() -> float:
    level, size = ctypes.c_int(0), ctypes.c_size_t(4)
    name = b"kern.memorystatus_vm_pressure_level"
    failed = ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(level), ctypes.byref(size), None, 0)
    return 0.0 if failed else {1: 0.0, 2: 50.0, 4: 100.0}.get(level.value, 0.0)
