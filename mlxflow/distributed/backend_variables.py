"""The environment variables from which MLX's backends read their group. Imports no MLX."""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from mlxflow.distributed.number_exchange import Meeting

#: The variable that names the file of the meeting place of the ranks of nccl.
MEETING = "MLXFLOW_MEETING"


class Variables(NamedTuple):
    """The variables of one rank.

    Attributes:
        values: by name.
        files: the content of a file by the name of the variable that has to name the file.
    """

    values: dict[str, str]
    files: dict[str, str]


def variables_of(
    backend: str, number: int, addresses: Sequence[Sequence[str]], *, rdma: Sequence[Sequence[Any]], key: str
) -> Variables:
    """Return the variables of a rank.

    Args:
        backend: "ring", "nccl", "jaccl" or "mpi", whose variables `MpiMeeting` has.
        number: of the rank.
        addresses: "IP:port" of all ranks: for ring, each that a rank listens on; else the first one of rank 0 counts,
            and for nccl one of another rank, where the ranks exchange numbers.
        rdma: for jaccl the device of each host to each other one; else not used.
        key: of the run, a secret.
    """
    values = {"MLX_RANK": str(number), "MLX_WORLD_SIZE": str(len(addresses))}
    if backend == "ring":
        return Variables(values, {"MLX_HOSTFILE": json.dumps([list(several) for several in addresses])})
    if backend == "jaccl":
        values["MLX_JACCL_COORDINATOR"] = addresses[0][0]
        return Variables(values, {"MLX_IBV_DEVICES": json.dumps([list(devices) for devices in rdma])})
    if backend == "mpi":
        return Variables(values, {})
    host, _, port = addresses[0][0].rpartition(":")
    meeting = _meeting(addresses, key)
    return Variables(values | {"NCCL_HOST_IP": host, "NCCL_PORT": port}, {MEETING: meeting.write()})


def _meeting(addresses: Sequence[Sequence[str]], key: str) -> Meeting:
    """Return where the ranks of nccl meet: at an address that NCCL does not use."""
    hub = next((number for number in range(len(addresses) - 1, 0, -1) if addresses[number]), 0)
    host, _, port = addresses[hub][0].rpartition(":")
    return Meeting(hub, host, int(port) + (0 if hub else 1), key)


def visible_gpu(number: int) -> str:
    """Return the GPU of a rank, among those that the user left visible.

    Args:
        number: of the rank among those of its host.
    """
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[number] if number < len(visible) else str(number)
