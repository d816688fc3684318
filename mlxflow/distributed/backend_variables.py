"""The environment variables from which MLX's backends read their group. Imports no MLX."""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple


class Variables(NamedTuple):
    """The variables of one rank.

    Attributes:
        values: by name.
        files: the content of a file by the name of the variable that has to name the file.
    """

    values: dict[str, str]
    files: dict[str, str]


def variables_of(
    backend: str, number: int, addresses: Sequence[Sequence[str]], *, rdma: Sequence[Sequence[Any]]
) -> Variables:
    """Return the variables of a rank.

    Args:
        backend: "ring", "nccl" or "jaccl".
        number: of the rank.
        addresses: "IP:port" of all ranks: for ring, each that a rank listens on; else the first one of rank 0 counts.
        rdma: for jaccl the device of each host to each other one; else not used.
    """
    values = {"MLX_RANK": str(number), "MLX_WORLD_SIZE": str(len(addresses))}
    if backend == "ring":
        return Variables(values, {"MLX_HOSTFILE": json.dumps([list(several) for several in addresses])})
    if backend == "jaccl":
        values["MLX_JACCL_COORDINATOR"] = addresses[0][0]
        return Variables(values, {"MLX_IBV_DEVICES": json.dumps([list(devices) for devices in rdma])})
    host, _, port = addresses[0][0].rpartition(":")
    return Variables(values | {"NCCL_HOST_IP": host, "NCCL_PORT": port}, {})


def visible_gpu(number: int) -> str:
    """Return the GPU of a rank, among those that the user left visible.

    Args:
        number: of the rank among those of its host.
    """
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[number] if number < len(visible) else str(number)
