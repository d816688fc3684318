"""Format numbers, and clean untrusted text, for display."""

import math
import re
from typing import Any

#: Shown for unknown figures.
UNKNOWN = "\N{EM DASH}"

# Characters that HTML cannot contain or that disguise text: controls, lone surrogates, changes of direction
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]"
)

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def clean(text: str) -> str:
    """Return an untrusted text for the page: characters that cannot be shown are replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def shorten(text: str, limit: int) -> str:
    """Return a text shortened to a number of characters by leaving out its middle."""
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (limit - head - 1) :]}"


def number(value: Any) -> float | None:
    """Return a value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def show(value: Any, digits: int = 3) -> str:
    """Return a number with some significant digits and thousands separators, or the sign of an unknown figure."""
    known = number(value)
    if known is None:
        return UNKNOWN
    if known == int(known) and abs(known) < 1e15:
        return f"{int(known):,}"
    size = abs(known)
    if size >= 10 ** (digits - 1):
        return f"{known:,.0f}" if size < 1e15 else f"{known:.{digits - 1}e}"
    if size < 1e-4:
        return f"{known:.{digits - 1}e}"
    rounded = abs(float(f"{known:.{digits - 1}e}"))  # 0.9996 has one digit more before its point
    return f"{known:.{max(0, digits - 1 - math.floor(math.log10(rounded)))}f}"


def show_large(value: Any) -> str:
    """Return a count with three digits and a unit: 7.90 M."""
    known = number(value)
    if known is None:
        return UNKNOWN
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(known) >= size:
            return f"{show(known / size)} {unit}"
    return show(known)


def show_bytes(value: Any, digits: int = 3) -> str:
    """Return bytes in a suitable unit, with 1,000 bytes per kB."""
    known = number(value)
    if known is None:
        return UNKNOWN
    power = 0
    while abs(known) >= 999.5 and power < len(_BYTE_UNITS) - 1:
        known, power = known / 1000, power + 1
    return f"{show(known, digits)} {_BYTE_UNITS[power]}"


def show_seconds(value: Any) -> str:
    """Return a duration in suitable units."""
    known = number(value)
    if known is None:
        return UNKNOWN
    if abs(known) >= 3600:
        return f"{int(known // 3600)} h {int(known % 3600 // 60):02} min"
    if abs(known) >= 100:
        return f"{int(known // 60)} min {int(known % 60):02} s"
    if abs(known) >= 1 or known == 0:
        return f"{show(known)} s"
    return f"{show(known * 1e3)} ms" if abs(known) >= 1e-3 else f"{show(known * 1e6)} \N{MICRO SIGN}s"


def show_percent(share: Any, digits: int = 1) -> str:
    """Return a share as a percentage."""
    known = number(share)
    return UNKNOWN if known is None else f"{100 * known:,.{digits}f} %"


def show_interval(value: Any, error: Any) -> str:
    """Return a figure with its standard error, rounded to two digits of the error."""
    known, spread = number(value), number(error)
    if known is None or spread is None or spread <= 0:
        return show(known, 4)
    places = max(0, 1 - math.floor(math.log10(spread)))
    return f"{known:,.{places}f} \N{PLUS-MINUS SIGN} {spread:,.{places}f}"


def plural(count: Any, one: str, many: str = "") -> str:
    """Return a count with its noun."""
    return f"{show(count)} {one if number(count) == 1 else many or one + 's'}"
