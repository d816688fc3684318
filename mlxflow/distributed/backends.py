"""Which backend connects the ranks on this machine."""

import os
from importlib.metadata import version
from pathlib import Path
from socket import gethostname

from mlxflow.device.compute_device import may_have_gpu
from mlxflow.distributed.hosts import Hostfile
from mlxflow.distributed.rank import BACKENDS
from mlxflow.distributed.table import Distributed
from mlxflow.messages.errors import WorkflowError

_GPUS = Path("/proc/driver/nvidia/gpus")


def resolve_backend(table: Distributed, device: str, found: Hostfile | None = None) -> str:
    """Return "ring", "nccl", "jaccl" or "mpi".

    Args:
        table: `[workflow.distributed]`.
        device: the workflow's `device`.
        found: its hostfile; None if all ranks are on this machine.
    """
    if table.backend != "auto":
        return table.backend
    if found is not None and found.backend:
        return found.backend
    return "nccl" if device != "cpu" and may_have_gpu() and count_gpus() else "ring"


def describe_ranks(table: Distributed, device: str, found: Hostfile | None = None) -> str:
    """Return the ranks and their backend in words, such as "2 ranks (ring)"; arguments as of `resolve_backend`."""
    backend = resolve_backend(table, device, found)
    if found is None:
        return f"{table.processes} ranks ({backend})"
    return f"{len(found.hosts)} ranks on {found.num_hosts} host{'s' * (found.num_hosts > 1)} ({backend})"


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    return len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0


def require_gpus(table: Distributed, backend: str, found: Hostfile | None = None) -> None:
    """Check that each rank of the backend nccl on this machine has a GPU.

    Args:
        table: `[workflow.distributed]`.
        backend: resolved.
        found: the hostfile; None if all ranks are on this machine.

    Raises:
        WorkflowError: there are fewer.
    """
    gpus = count_gpus()
    if backend != "nccl":
        return
    if found is not None:
        here = sum(host.is_here for host in found.hosts)
        if gpus < here:
            raise WorkflowError(
                f"{found.file}: {here} entries are this machine, and {gpus} NVIDIA GPUs can be used here. The backend "
                'nccl needs one for each. Remove entries, or use backend = "ring".'
            )
    elif gpus < table.processes:
        least = f"Set it to {gpus}, or" if gpus > 1 else "Remove it, or"
        raise WorkflowError(
            f"workflow.distributed.processes = {table.processes}: the backend nccl needs an NVIDIA GPU for each, and "
            f'{gpus} can be used here. {least} set workflow.distributed.backend = "ring".'
        )


def require_available(backend: str) -> None:
    """Check that MLX has a backend here; imports MLX.

    Raises:
        WorkflowError: it has not.
    """
    import mlx.core as mx

    if not mx.distributed.is_available(backend):
        known = [name for name in BACKENDS[1:] if mx.distributed.is_available(name)]
        advice = f'Use backend = "{known[0]}".' if known else "Install MLX with one."
        raise WorkflowError(
            f'workflow.distributed.backend = "{backend}": MLX {version("mlx")} has no {backend} on {gethostname()}. '
            f"{advice}"
        )
