"""The `mlxflow` command; see `mlxflow.cli`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` puts the project first on sys.path: its random.py would shadow Python's
    sys.path.append(sys.path.pop(0))

from mlxflow.cli.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
