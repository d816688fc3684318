"""The systems on which MLX runs at all; others get one line instead of an error of the import."""

import platform
import sys

#: The oldest macOS for which MLX is made.
_OLDEST_MACOS = 14


def mistake() -> str | None:
    """Return why MLX cannot run here, and what to do; None if it can. Imports no mlx."""
    if sys.platform != "darwin":
        return None
    if platform.machine() != "arm64":
        return (
            f"mlxflow: this Python is for Intel processors ({platform.machine()}): expected one for Apple silicon "
            "(arm64), which MLX needs. On an Intel Mac MLX does not run; on another, install an arm64 Python."
        )
    version = platform.mac_ver()[0]
    first = version.partition(".")[0]
    if first.isdigit() and 10 < int(first) < _OLDEST_MACOS:
        return f"mlxflow: macOS {version}: expected macOS {_OLDEST_MACOS} or newer, which MLX needs. Update macOS."
    return None
