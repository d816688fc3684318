"""Which backend connects the ranks on this machine. Imports no MLX."""

import os
from pathlib import Path

from mlxflow.device.compute_device import may_have_gpu
from mlxflow.distributed.table import Distributed
from mlxflow.messages.errors import WorkflowError

_GPUS = Path("/proc/driver/nvidia/gpus")


def resolve_backend(table: Distributed, device: str) -> str:
    """Return "ring" or "nccl".

    Args:
        table: `[workflow.distributed]`.
        device: the workflow's `device`.
    """
    if table.backend != "auto":
        return table.backend
    return "nccl" if device != "cpu" and may_have_gpu() and count_gpus() else "ring"


def describe_ranks(table: Distributed, device: str) -> str:
    """Return the ranks and their backend in words, such as "2 ranks (ring)"; arguments as of `resolve_backend`."""
    return f"{table.processes} ranks ({resolve_backend(table, device)})"


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    return len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0


def require_gpus(table: Distributed, backend: str) -> None:
    """Check that each rank of the backend nccl has a GPU.

    Args:
        table: `[workflow.distributed]`.
        backend: resolved.

    Raises:
        WorkflowError: there are fewer.
    """
    gpus = count_gpus()
    if backend == "nccl" and gpus < table.processes:
        least = f"Set it to {gpus}, or" if gpus > 1 else "Remove it, or"
        raise WorkflowError(
            f"workflow.distributed.processes = {table.processes}: the backend nccl needs an NVIDIA GPU for each, and "
            f'{gpus} can be used here. {least} set workflow.distributed.backend = "ring".'
        )
