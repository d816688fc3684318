"""What a running stage gets besides its own table: seed, device, limits, folders, and the digests of its inputs."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mlxflow.storage import layout
from mlxflow.storage.observed_inputs import ObservedInputs


class ModelFolder(msgspec.Struct, frozen=True, kw_only=True):
    """The files of a model folder and its report; the outputs of every stage that makes a model."""

    config: Path = Path("config.json")
    model: Path = Path("model.safetensors")
    tokenizer: Path = Path("tokenizer.json")
    tokenizer_config: Path = Path("tokenizer_config.json")
    report: Path = Path(layout.REPORT)


class Member(NamedTuple):
    """A stage or variant of a workflow as other stages and the page see it.

    Attributes:
        task: its name.
        folder: the artifact, relative to the workflow's folder.
        reads: the stages that make its inputs.
        outputs: the files it writes, relative to the workflow's folder.
        stale: reasons why it is stale, in words; empty if it is fresh or was not checked.
    """

    task: str
    folder: Path
    reads: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    stale: str = ""


class RankSpeed(NamedTuple):
    """The speed of a training on a number of processes.

    Attributes:
        ranks: these processes.
        backend: of their communication; empty for one process.
        tokens_per_second: learned from by all of them.
        waited_seconds: of each rank for the others; empty for one process.
    """

    ranks: int
    backend: str
    tokens_per_second: float
    waited_seconds: tuple[float, ...]


def no_rank_speeds(task: str, num_steps: int) -> tuple[RankSpeed, ...]:
    """Return no speeds, for a context without ranks."""
    return ()


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """The environment of a running stage: everything it gets besides its own table.

    Attributes:
        task: the stage's name, with `:variant` for a variant.
        seed: the workflow's seed; derive others from it with `derive_seed`.
        device: "gpu" or "cpu", as resolved.
        memory_limit_bytes: MLX's memory limit; 0 for a stage that does not use MLX.
        provenance: metadata for the header of every file: stage, digests, versions, seed.
        root: the workflow's folder.
        state: the folder for state that is kept between runs.
        tasks: every stage and variant of the workflow.
        members: the same with the inputs and outputs of each.
        name: of the workflow.
        folder: the folder for the outputs; it becomes the artifact if the stage succeeds.
        unfinished: a folder for checkpoints from which an interrupted run is resumed; removed after success. Each
            configuration of the stage has its own.
        published: the stage's existing artifact, if the stage is built again for a comparison; else None.
        begun: the value of the module's `begin`; None without one.
        digests: of the inputs as first read by this run.
        if_interrupted: functions that are called if a signal ends the stage before its artifact is in place, to save
            work for the next run; none in the copy that a child process of the stage gets.
        time_ranks: returns the speeds of a train stage on one process and on all ranks, measured in a number of
            updates; empty if the workflow has one rank, and in the copy that a child process of the stage gets.
    """

    task: str
    seed: int
    device: str
    memory_limit_bytes: int
    provenance: dict[str, str]
    root: Path
    state: Path
    tasks: tuple[str, ...]
    members: tuple[Member, ...]
    name: str
    folder: Path
    unfinished: Path
    digests: ObservedInputs
    published: Path | None = None
    begun: Any = None
    time_ranks: Callable[[str, int], tuple[RankSpeed, ...]] = no_rank_speeds
    if_interrupted: list[Callable[[], None]] = msgspec.field(default_factory=list)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a copy in another process is made of: it cannot start ranks, which takes the stages' modules."""
        own = ("time_ranks", "if_interrupted")
        fields = {name: getattr(self, name) for name in self.__struct_fields__ if name not in own}
        return partial(type(self), **fields), ()


def derive_seed(seed: int, name: str) -> int:
    """Return a 32-bit seed for the random choice of a name: the first bytes of SHA-256 of `seed:name`."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "little")
