"""What a cached result about kernels depends on: device, system, MLX's version and the kernels' own source files."""

import functools
import hashlib
import platform
from pathlib import Path

from mlxflow.device import compute_device

# The product that is verified against MLX's packed one; its module imports mlx
_DENSE_PRODUCT = Path(__file__).parents[1] / "ops" / "quantized_matmul.py"


def environment() -> str:
    """Return the text under which results are cached: they hold for this device, system, MLX and these sources."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    mlx_version = compute_device.environment(None)["mlx"]
    return " | ".join([compute_device.name(), system, f"mlx {mlx_version}", sources_digest()])


@functools.cache
def sources_digest() -> str:
    """Return the digest of every Python file of this package, in sub-folders too, and of what it verifies elsewhere."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.rglob("*.py")), _DENSE_PRODUCT]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
