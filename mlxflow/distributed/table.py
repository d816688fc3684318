"""The `[workflow.distributed]` table: how many processes train a model, and how. Imports no MLX."""

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mlxflow.distributed.rank import MAX_PROCESSES

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*")
_DURATION_PATTERN = r"^\s*\d+(\.\d+)?\s*(s|min|h)\s*$"
_SECONDS = {"s": 1, "min": 60, "h": 3600}

#: The longest `step_timeout`.
MAX_TIMEOUT_SECONDS = 7 * 24 * 3600


class Distributed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[workflow.distributed]` table.

    It determines how a model is trained, not which model: no key makes an artifact stale.
    """

    processes: Annotated[
        int,
        Meta(
            ge=1,
            le=MAX_PROCESSES,
            examples=[2],
            description="processes (ranks) on this machine that share the forward passes of each update of `train` "
            "and of quantization-aware training",
        ),
    ] = 1
    hosts: Annotated[
        str,
        Meta(
            examples=["hosts.json"],
            description="instead of processes: a hostfile as mlx.distributed_config writes it, with an entry for each "
            "rank; the first one is this machine, and ranks on other hosts are started by ssh; empty: none",
        ),
    ] = ""
    python: Annotated[
        str, Meta(description="the Python with mlxflow on the other hosts; empty: the same path as on this one")
    ] = ""
    backend: Annotated[
        Literal["auto", "ring", "nccl", "jaccl", "mpi"],
        Meta(
            description="communication between ranks: ring over TCP, nccl with one NVIDIA GPU for each rank, jaccl "
            "over Thunderbolt with RDMA, or mpi by Open MPI; auto: what the hostfile says, or nccl "
            "if device allows a GPU and there are NVIDIA GPUs, else ring"
        ),
    ] = "auto"
    reduction: Annotated[
        Literal["ordered", "fast"],
        Meta(
            description="sum of gradients: ordered: in the order of the forward passes, with the same bits for any "
            "number of ranks; fast: the backend's own sum, which moves less data and rounds differently"
        ),
    ] = "ordered"
    optimizer_sharding: Annotated[
        bool,
        Meta(
            description="each rank keeps a part of the optimizer's state and of fp32 copies of the weights (ZeRO-1), "
            "and the ranks exchange the updated weights; for optimizers that update each number by itself, such as "
            "adamw and sgd"
        ),
    ] = False
    sharding: Annotated[
        Literal["none", "full"],
        Meta(
            description="full: each rank keeps a part of each layer's weights and of their optimizer state, and a "
            "layer gathers its weights where it computes (ZeRO-3); for training of all weights with the backends nccl "
            'and jaccl and reduction = "fast", for adapters, beside which the frozen weights are split, with all'
        ),
    ] = "none"
    step_timeout: Annotated[
        str,
        Meta(
            pattern=_DURATION_PATTERN,
            examples=["90 s"],
            description="longest time without progress of a rank, such as one forward pass; then all ranks are ended "
            "and start again",
        ),
    ] = "10 min"
    restarts: Annotated[
        int,
        Meta(
            ge=0,
            le=1000,
            description="how often all ranks start again from the last checkpoint because a rank ended or was silent",
        ),
    ] = 3

    @property
    def timeout_seconds(self) -> float:
        """The time of `step_timeout`."""
        return parse_duration(self.step_timeout)


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as `90 s`, `10 min` or `1.5 h`.

    Raises:
        ValueError: the text is no duration.
    """
    match = _DURATION.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no duration such as '90 s' or '10 min'")
    return float(match[1]) * _SECONDS[match[2]]
