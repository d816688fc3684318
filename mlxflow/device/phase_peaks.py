"""MLX has one peak counter for the whole process; this shares it among phases that lie within each other.

The counter is reset where a phase begins and ends. What it said until then is credited to every phase that is open,
so no phase takes another one's peak away, whichever profiler or thread it belongs to. MLX can reset its counter and
not set it: once a phase was open it no longer holds the whole process's peak, which `process_peak` does. So nothing
else in mlxflow resets it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


class OpenPeak:
    """The most that MLX's arrays held since this was opened, in bytes."""

    def __init__(self, active_memory_bytes: int) -> None:
        self.bytes = active_memory_bytes


_lock = threading.Lock()
_open: list[OpenPeak] = []
_before_resets = 0  # the most that the counter held whenever it was reset


def process_peak() -> int:
    """Return the most that MLX's arrays ever held in this process, in bytes, whatever was reset here."""
    with _lock:
        return max(_before_resets, mx.get_peak_memory(), mx.get_active_memory())


def reset() -> None:
    """Let MLX's counter begin again from what is alive, without taking a peak from any phase or from the process."""
    with _lock:
        _credit()


def open_peak() -> OpenPeak:
    """Begin to follow the peak."""
    with _lock:
        _credit()
        peak = OpenPeak(mx.get_active_memory())
        _open.append(peak)
        return peak


def close_peak(peak: OpenPeak) -> int:
    """End it and return the peak in bytes."""
    with _lock:
        _credit()
        _open.remove(peak)
        return peak.bytes


def so_far(peak: OpenPeak) -> int:
    """Return the peak so far in bytes, and let it go on."""
    with _lock:
        return max(peak.bytes, mx.get_peak_memory(), mx.get_active_memory())


def forget(peak: OpenPeak) -> None:
    """End it, if that was not done, without asking MLX: also while the interpreter ends."""
    if peak in _open:
        _open.remove(peak)


@contextmanager
def followed() -> Iterator[OpenPeak]:
    """Follow the peak until the block ends; then its `bytes` say what it was."""
    peak = open_peak()
    try:
        yield peak
    finally:
        close_peak(peak)


def note_peak(peak: OpenPeak) -> int:
    """Return the peak so far in bytes, and let it begin anew from what is alive."""
    with _lock:
        _credit()
        so_far, peak.bytes = peak.bytes, mx.get_active_memory()
        return max(so_far, peak.bytes)


def look() -> None:
    """Credit what the counter says without resetting it: for a sampler, in case the program resets it itself."""
    with _lock:
        seen = mx.get_peak_memory()
        for peak in _open:
            peak.bytes = max(peak.bytes, seen)


def _credit() -> None:
    global _before_resets
    seen = max(mx.get_peak_memory(), mx.get_active_memory())
    for peak in _open:
        peak.bytes = max(peak.bytes, seen)
    _before_resets = max(_before_resets, seen)
    mx.reset_peak_memory()
