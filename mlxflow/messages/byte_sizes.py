"""Numbers of bytes in messages, in the unit in which they have digits."""


def show_bytes(num_bytes: float) -> str:
    """Return a number of bytes for a message, such as `140 GB`, `20.3 GB`, `0.86 GB`, `40.1 MB` or `512 bytes`.

    Memory is counted in GB down to a tenth, so that a peak and its limit can be compared at a glance. Three digits
    distinguish a peak of 20.4 GB from the limit of 20.2 GB that it exceeds.

    Args:
        num_bytes: of memory or of a file.
    """
    if num_bytes >= 99.95e9:
        return f"{num_bytes / 1e9:,.0f} GB"
    if num_bytes >= 9.995e9:
        return f"{num_bytes / 1e9:.1f} GB"
    if num_bytes >= 0.1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:,.0f} bytes"


def show_apart(num_bytes: int, other: int) -> tuple[str, str]:
    """Return two numbers of bytes for a message that compares them: in full where `show_bytes` shows them alike."""
    shown = show_bytes(num_bytes), show_bytes(other)
    return shown if shown[0] != shown[1] or num_bytes == other else (f"{num_bytes:,} bytes", f"{other:,} bytes")
