"""The device MLX computes on: which one, how much memory it may use, what it is called.

Asks the device what it can do and never assumes anything from the platform's name.
"""

import functools
import os
import re
import sys
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlxflow.errors import WorkflowError
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


#: The most that a size may be; MLX takes its limits as 64-bit numbers.
_MAX_SIZE_BYTES, _MAX_SIZE = 2**50, "1024 TiB"


def size_mistake(text: str) -> str | None:
    """Return what was expected of a size such as `12 GB` or `80%` where it is out of bounds, else None.

    Args:
        text: of the form `SIZE_PATTERN`.
    """
    number, unit = _read_size(text)
    if unit == "%":
        return "expected at most 100%" if number > 100 else None
    return f"expected at most {_MAX_SIZE}" if number * _UNITS[unit] > _MAX_SIZE_BYTES else None


# MLX's CUDA backend hands the device graphs of so many operations, by an environment variable that it reads once. All
# that a graph works on is held until its last operation is done. With MLX's own 100 on an H100 a training step holds a
# quarter more memory and is no faster; one that computes layers anew is slower under a limit (`benchmarks/train.py`).
# Of other devices MLX has 20, but of those of compute capability 10.0 and 12.0, for which it has 100, too.
_GRAPH_SIZE = "MLX_MAX_OPS_PER_BUFFER"
_IS_TOLD = _GRAPH_SIZE in os.environ


def bound_graphs(*, recomputes: bool = False) -> None:
    """Let MLX's CUDA backend work in small graphs, unless the environment says how large they are.

    Has no effect once the GPU was used.

    Args:
        recomputes: a backward pass computes layers anew, and holds little but what graphs hold.
    """
    import mlx.core as mx

    if _IS_TOLD or not (hasattr(mx, "cuda") and mx.cuda.is_available()):
        return
    told = mx.device_info()
    has_large = int(told.get("compute_capability_major", 0)) >= 9 and int(told.get("compute_capability_minor", 1)) == 0
    if has_large:
        os.environ[_GRAPH_SIZE] = "10" if recomputes else "30"


_DRIVER = Path("/proc/driver/nvidia/version")


def may_have_gpu() -> bool:
    """Return whether this machine may have a GPU that MLX uses; imports no mlx."""
    return _DRIVER.exists() or (sys.platform == "darwin" and os.uname().machine == "arm64")


def turn(task: str, root: Path, device: str, *, measures: bool) -> AbstractContextManager[object]:
    """Return what holds this machine's device for a stage until the block ends; imports no mlx.

    A GPU is one stage's at a time: each takes the memory that is there. Processors are shared, but by a stage that
    measures them: it waits for the others, and they wait for it.

    Args:
        task: the stage, for the lines that this process and others print while they wait.
        root: the workflow's folder, for the lines that others print.
        device: the workflow's `device`.
        measures: whether the artifact says how fast this machine is.
    """
    shared = not measures and (device == "cpu" or not may_have_gpu())
    what = "the device" if not shared else "measurements on this machine to end"
    waiting = f"{task}: waits for {what}, used by process {{holder}}"
    return hold(device_lock(), waiting, wait=True, shared=shared, about=f"({task} of {root.resolve()})")


def select(device: str) -> str:
    """Make a device MLX's default and return "gpu" or "cpu".

    Args:
        device: "auto" (the GPU where there is one), "gpu" or "cpu".

    Raises:
        WorkflowError: a GPU was asked for where MLX has none.
    """
    import mlx.core as mx

    has_gpu = mx.metal.is_available() or (hasattr(mx, "cuda") and mx.cuda.is_available())
    if device == "gpu" and not has_gpu:
        raise WorkflowError('workflow.device = "gpu": MLX finds no GPU here. Use workflow.device = "auto".')
    chosen = "gpu" if has_gpu and device != "cpu" else "cpu"
    mx.set_default_device(mx.gpu if chosen == "gpu" else mx.cpu)
    bound_graphs()
    return chosen


def working_set_bytes() -> int:
    """Return the bytes that the default device can use well.

    That is its recommended working set where it tells one (Metal), else its own memory (CUDA), else the main memory.
    """
    import mlx.core as mx
    import psutil

    told = mx.device_info()
    keys = ("max_recommended_working_set_size", "total_memory", "memory_size")
    return next((int(told[key]) for key in keys if told.get(key)), 0) or int(psutil.virtual_memory().total)


def name() -> str:
    """Return the name of MLX's default device as MLX tells it, or the processor's."""
    import mlx.core as mx

    return str(mx.device_info().get("device_name") or processor())


def environment(device: str | None) -> dict[str, Any]:
    """Return what of this machine an artifact depends on, as JSON values; imports no mlx.

    Args:
        device: the workflow's `device` for a stage whose artifact tells about the machine, else None.
    """
    found: dict[str, Any] = {"mlx": _mlx_version()}
    if device is not None:
        found["device"] = [device, os.uname().sysname, processor()]
    return found


@functools.cache
def _mlx_version() -> str:
    return version("mlx")


@functools.cache
def processor() -> str:
    """Return the processor's model as the system tells it; imports no mlx."""
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
