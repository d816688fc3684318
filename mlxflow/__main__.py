"""The `mlxflow` command; see `mlxflow.cli`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))  # `python -m` puts the project's folder first: its random.py would be Python's

from mlxflow.cli.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
