"""Move the project's folder to the end of `sys.path`, so that its files do not shadow Python's modules.

doit puts the folder of dodo.py first. A `random.py` there would otherwise be imported instead of Python's.
"""

import os
import sys


def search_project_last() -> None:
    """Move the current folder, which is the project's while dodo.py is loaded, to the end of `sys.path`."""
    folder = os.getcwd()  # noqa: PTH109
    project = {"", folder, os.path.realpath(folder)}
    ours = [place for place in sys.path if place in project]
    if ours:
        sys.path[:] = [*(place for place in sys.path if place not in project), folder]
