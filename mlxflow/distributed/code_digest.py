"""A digest of the code that trains, to compare the ranks of a run."""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path


@functools.cache
def code_digest() -> str:
    """Return a digest of this package's source and of the version of MLX."""
    digest = hashlib.sha256(version("mlx").encode())
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
