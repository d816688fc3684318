"""The device that MLX computes on: selection, name, usable memory, sizes in settings, and the lock on it.

Capabilities are queried from the device, never derived from the platform's name.
"""

import functools
import os
import re
import sys
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlxflow.messages.errors import WorkflowError
from mlxflow.storage.locks import device_lock, hold

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMGT]?I?B)\s*", re.IGNORECASE)

#: The form of a memory limit, for the workflow's schema.
SIZE_PATTERN = r"^\s*\d+(\.\d+)?\s*(%|[KkMmGgTt]?[Ii]?[Bb])\s*$"


def parse_size(text: str, whole_bytes: int) -> int:
    """Return the bytes of a size such as `12 GB`, `512MiB` or `80%` of a whole.

    Raises:
        ValueError: the text is no size.
    """
    number, unit = _read_size(text)
    return int(whole_bytes * number / 100) if unit == "%" else int(number * _UNITS[unit])


def _read_size(text: str) -> tuple[float, str]:
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no size such as '12 GB' or '80%'")
    return float(match[1]), match[2].upper()


#: The upper bound of sizes; MLX takes its limits as 64-bit numbers.
_MAX_SIZE_BYTES, _MAX_SIZE = 2**50, "1024 TiB"


def size_mistake(text: str) -> str | None:
    """Return the expected range of a size such as `12 GB` or `80%` that is out of bounds; None for one within them.

    Args:
        text: of the form `SIZE_PATTERN`.
    """
    number, unit = _read_size(text)
    if unit == "%":
        return "expected at most 100%" if number > 100 else None
    return f"expected at most {_MAX_SIZE}" if number * _UNITS[unit] > _MAX_SIZE_BYTES else None


# Operations in a CUDA graph of MLX, an environment variable that MLX reads once. All arrays of a graph are held until
# its last operation is done. With MLX's default of 100 on an H100 a training step holds a quarter more memory and is no
# faster; a step with gradient checkpointing is slower under a memory limit (`benchmarks/train.py`). The default is 100
# for compute capabilities 9.0, 10.0 and 12.0, and 20 for other devices.
_GRAPH_SIZE = "MLX_MAX_OPS_PER_BUFFER"
_IS_SET_BY_USER = _GRAPH_SIZE in os.environ


def bound_graphs(*, recomputes: bool = False) -> None:
    """Make MLX's CUDA graphs smaller where its default is large, unless the environment variable is set.

    Has no effect once the GPU was used.

    Args:
        recomputes: the steps use gradient checkpointing: graphs hold most of their memory, and are made smaller still.
    """
    import mlx.core as mx

    if _IS_SET_BY_USER or not (hasattr(mx, "cuda") and mx.cuda.is_available()):
        return
    info = mx.device_info()
    has_large = int(info.get("compute_capability_major", 0)) >= 9 and int(info.get("compute_capability_minor", 1)) == 0
    if has_large:
        os.environ[_GRAPH_SIZE] = "10" if recomputes else "30"


# Of a batch, by compute capability (CUDA; 20 and 100 for others) and by the last letter of the architecture's name
# (Metal; 40 and 40 for others), as `mlx/backend/*/device.cpp` has them in MLX 0.32
_CUDA_BATCHES = {(8, 0): (20, 400), (9, 0): (100, 1000), (10, 0): (100, 1000), (12, 0): (100, 1000), (12, 1): (20, 25)}
_METAL_BATCHES = {"p": (20, 40), "s": (50, 50), "d": (50, 50)}


def batch_limits() -> tuple[int, int]:
    """Return when MLX sends a batch of operations to the GPU: a CUDA graph or a command buffer of Metal.

    Returns:
        a number of operations that it exceeds, or the count of numbers that its operations' inputs have together:
        `MLX_MAX_MB_PER_BUFFER` limits numbers, not bytes.
    """
    import mlx.core as mx

    info = mx.device_info()
    if "compute_capability_major" in info:
        capability = int(info["compute_capability_major"]), int(info["compute_capability_minor"])
        operations, mega = _CUDA_BATCHES.get(capability, (20, 100))
    else:
        operations, mega = _METAL_BATCHES.get(str(info.get("architecture", ""))[-1:], (40, 40))
    operations = int(os.environ.get(_GRAPH_SIZE, operations))
    return operations, (int(os.environ.get("MLX_MAX_MB_PER_BUFFER", mega)) + 1) << 20


_DRIVER = Path("/proc/driver/nvidia/version")


def may_have_gpu() -> bool:
    """Return whether this machine may have a GPU that MLX uses; imports no mlx."""
    return _DRIVER.exists() or (sys.platform == "darwin" and os.uname().machine == "arm64")


def turn(task: str, root: Path, device: str, *, measures: bool) -> AbstractContextManager[object]:
    """Return a context manager that holds the lock on this machine's device for a stage; imports no mlx.

    The lock on a GPU is exclusive: a stage takes all of its memory. The lock on processors is shared, but exclusive for
    a stage that measures their speed.

    Args:
        task: the stage, for the lines that this and other processes print while they wait.
        root: the workflow's folder, for the lines that others print.
        device: the workflow's `device`.
        measures: whether the stage measures the speed of this machine.
    """
    shared = not measures and (device == "cpu" or not may_have_gpu())
    what = "the device" if not shared else "measurements on this machine to end"
    waiting = f"{task}: waits for {what}, used by process {{holder}}"
    return hold(device_lock(), waiting, wait=True, shared=shared, about=f"({task} of {root.resolve()})")


def select(device: str, *, key: str = "device") -> str:
    """Make a device MLX's default and return "gpu" or "cpu".

    Args:
        device: "auto" (the GPU if there is one), "gpu" or "cpu".
        key: the setting, for the message.

    Raises:
        WorkflowError: a GPU is requested and MLX has none.
    """
    import mlx.core as mx

    has_gpu = mx.is_available(mx.gpu)  # mx.metal.is_available() is true on every Mac, one without a GPU too
    if device == "gpu" and not has_gpu:
        raise WorkflowError(f'{key} = "gpu": MLX finds no GPU here. Use {key} = "auto".')
    chosen = "gpu" if has_gpu and device != "cpu" else "cpu"
    mx.set_default_device(mx.gpu if chosen == "gpu" else mx.cpu)
    bound_graphs()
    return chosen


def working_set_bytes() -> int:
    """Return the memory in bytes that the default device can use without slowing down.

    That is the recommended working set (Metal), the device's own memory (CUDA), or else the main memory.
    """
    import mlx.core as mx
    import psutil

    info = mx.device_info()
    keys = ("max_recommended_working_set_size", "total_memory", "memory_size")
    return next((int(info[key]) for key in keys if info.get(key)), 0) or int(psutil.virtual_memory().total)


def name() -> str:
    """Return the name of MLX's default device, or that of the processor where MLX has none."""
    import mlx.core as mx

    return str(mx.device_info().get("device_name") or processor())


def environment(device: str | None) -> dict[str, Any]:
    """Return the facts about this machine that an artifact depends on, as JSON values; imports no mlx.

    Args:
        device: the workflow's `device` for a stage whose artifact describes the machine, else None.
    """
    facts: dict[str, Any] = {"mlx": _mlx_version()}
    if device is not None:
        facts["device"] = [device, os.uname().sysname, processor()]
    return facts


@functools.cache
def _mlx_version() -> str:
    return version("mlx")


@functools.cache
def processor() -> str:
    """Return the processor's model name from the operating system; imports no mlx."""
    if Path("/proc/cpuinfo").exists():
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    elif os.uname().sysname == "Darwin":
        import subprocess

        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return os.uname().machine
