"""The number of cores of the GPU, from which kernels derive how many groups of threads share their work."""

import functools
import re
import subprocess
import sys

# Multiprocessors of an H100 or H200, on which kernels for CUDA were measured, and cores of an M-series chip of the
# base model, for a Mac that gives no number, such as a virtual one
_NVIDIA_CORES, _APPLE_CORES = 132, 10

# The entry of the GPU in macOS's registry of devices; PyTorch reads the same property for `torch.mps`
_COMMAND = ("ioreg", "-r", "-c", "AGXAccelerator", "-d", "1")
_PROPERTY = re.compile(r'"gpu-core-count"\s*=\s*(\d+)')


@functools.cache
def gpu_cores() -> int:
    """Return the number of cores of an Apple GPU; elsewhere that of the GPU on which the kernels were measured.

    It is the same in every process on a machine, so that sums are added in the same order.
    """
    if sys.platform != "darwin":
        return _NVIDIA_CORES
    try:
        printed = subprocess.run(_COMMAND, capture_output=True, text=True, check=False).stdout
    except OSError:
        return _APPLE_CORES
    found = _PROPERTY.search(printed)
    return max(1, int(found[1])) if found else _APPLE_CORES
