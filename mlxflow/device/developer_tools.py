"""Programs of Apple's command line tools, which a Mac may lack.

There `/usr/bin` has a stand-in for each of them, such as `git` and `g++`: calling one opens a window that offers to
install the tools, also in the middle of a build. So it is called only where the tools are installed.
"""

import functools
import shutil
import subprocess
import sys
from pathlib import Path

#: The command that installs them.
INSTALL = "xcode-select --install"

# The folder of the stand-ins
_STAND_INS = "/usr/bin"


def find(program: str) -> str | None:
    """Return the path of a program that may be called; None if it is missing, or a stand-in for one that is."""
    path = shutil.which(program)
    if path is None or not _is_stand_in(path):
        return path
    return None


def _is_stand_in(path: str) -> bool:
    return sys.platform == "darwin" and Path(path).parent == Path(_STAND_INS) and not _are_installed()


@functools.cache
def _are_installed() -> bool:
    """Return whether the tools have a folder; asking opens no window."""
    try:
        asked = subprocess.run(["xcode-select", "-p"], capture_output=True, check=False)
    except FileNotFoundError:
        return False
    return asked.returncode == 0
