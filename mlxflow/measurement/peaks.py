"""MLX has one peak counter for the whole process; this shares it among phases that lie within each other.

The counter is reset where a phase begins and ends. What it said until then is credited to every phase that is open,
so no phase takes another one's peak away, whichever profiler or thread it belongs to.
"""

import threading

import mlx.core as mx


class OpenPeak:
    """The most that MLX's arrays held since this was opened, in bytes."""

    def __init__(self, active_memory_bytes: int) -> None:
        self.bytes = active_memory_bytes


_lock = threading.Lock()
_open: list[OpenPeak] = []


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


def forget(peak: OpenPeak) -> None:
    """End it, if that was not done, without asking MLX: also while the interpreter ends."""
    if peak in _open:
        _open.remove(peak)


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
    seen = max(mx.get_peak_memory(), mx.get_active_memory())
    for peak in _open:
        peak.bytes = max(peak.bytes, seen)
    mx.reset_peak_memory()
