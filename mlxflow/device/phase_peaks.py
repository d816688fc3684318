"""Peak memory of nested phases, from MLX's single peak counter for the process.

The counter is reset where a phase begins and ends. Its value before a reset is credited to every open phase, so no
phase loses its peak to another one, of any profiler or thread. Afterwards MLX's counter no longer holds the peak
of the process; `process_peak` does. Nothing else in mlxflow resets the counter.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


class OpenPeak:
    """The peak of the memory held by MLX arrays since this was opened, in bytes; made by `open_peak`."""

    def __init__(self, active_memory_bytes: int) -> None:
        self.bytes = active_memory_bytes


_lock = threading.Lock()
_open: list[OpenPeak] = []
_before_resets = 0  # the largest value of the counter before any reset


def process_peak() -> int:
    """Return the peak of the memory held by MLX arrays in this process, in bytes, including before resets."""
    with _lock:
        return max(_before_resets, mx.get_peak_memory(), mx.get_active_memory())


def reset() -> None:
    """Reset MLX's counter to the active memory; the peaks of open phases and of the process are kept."""
    with _lock:
        _credit()


def open_peak() -> OpenPeak:
    """Begin to track a peak; end it with `close_peak` or `forget`."""
    with _lock:
        _credit()
        peak = OpenPeak(mx.get_active_memory())
        _open.append(peak)
        return peak


def close_peak(peak: OpenPeak) -> int:
    """End a peak and return it in bytes."""
    with _lock:
        _credit()
        _open.remove(peak)
        return peak.bytes


def so_far(peak: OpenPeak) -> int:
    """Return a peak so far in bytes; it stays open."""
    with _lock:
        return max(peak.bytes, mx.get_peak_memory(), mx.get_active_memory())


def forget(peak: OpenPeak) -> None:
    """End a peak, if it is open, without a call of MLX: safe while the interpreter shuts down."""
    if peak in _open:
        _open.remove(peak)


@contextmanager
def followed() -> Iterator[OpenPeak]:
    """Track a peak until the block ends; `bytes` then holds it."""
    peak = open_peak()
    try:
        yield peak
    finally:
        close_peak(peak)


def note_peak(peak: OpenPeak) -> int:
    """Return a peak so far in bytes and restart it from the active memory."""
    with _lock:
        _credit()
        so_far, peak.bytes = peak.bytes, mx.get_active_memory()
        return max(so_far, peak.bytes)


def look() -> None:
    """Credit the counter's value without resetting it: for a sampler, in case the program resets the counter."""
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
