"""How a training step is done: a workflow's own way, the naive one, and the ways between, one thing switched off."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

from mlxflow.errors import ArtifactError


def checkpoint_every(checkpointing: str | int) -> int:
    """Return every so-manieth layer is computed anew in the backward pass by the key `checkpointing`; 0 for none."""
    return checkpointing if isinstance(checkpointing, int) else int(checkpointing == "layers")


class Job(NamedTuple):
    """What is trained; the same for every recipe, whatever the speed.

    Attributes:
        optimizer: of `mlx.optimizers`, in small letters.
        options: of it, by MLX's names.
        weight_decay: of matrices.
        max_grad_norm: gradients of a larger norm are scaled down to it; 0 for none.
        learning_rate: at its highest.
        masks_documents: no token attends to another document in its row.
        lora: the adapters that are trained, as `training.adapters.AdapterShape` has them; None for all weights.
    """

    optimizer: str
    options: dict[str, Any]
    weight_decay: float
    max_grad_norm: float
    learning_rate: float
    masks_documents: bool
    lora: dict[str, Any] | None


class Recipe(NamedTuple):
    """How a step is done.

    Attributes:
        name: "workflow", "baseline", or "without" and what is switched off.
        batch_size: rows a step, B.
        precision: "fp32", "bf16" (fp32 weights beside the model) or "bf16-pure".
        is_compiled: the step is one compiled graph.
        runs_ahead: the host builds the next step while the device computes this one; else it waits for each.
        loss: "fused" with the head, "own" cross-entropy of all logits, or "plain": MLX's.
        does_own_arithmetic: see `training.arithmetic`; else all is MLX's.
        is_deterministic: every gradient is added up in one order: see there.
        joins_updates: the optimizer works on all matrices as one; else on each.
        kernels: names of our own that serve on this device, as `train` recorded them; those of another type do not.
        checkpoint_every: every so-manieth layer's activations are computed anew; 0 for none.
        is_packed: rows as the token file has them; else each piece of a document is a row of its own, padded.
        is_trimmed: padded rows are cut to the longest of their batch; else all are of one length.
        workers: threads that gather batches.
        prefetch_batches: gathered ahead; 0 gathers each when it is wanted, in line.
    """

    name: str
    batch_size: int
    precision: str
    is_compiled: bool
    runs_ahead: bool
    loss: str
    does_own_arithmetic: bool
    is_deterministic: bool
    joins_updates: bool
    kernels: tuple[str, ...]
    checkpoint_every: int
    is_packed: bool
    is_trimmed: bool
    workers: int
    prefetch_batches: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, batch_size: int, is_packed: bool) -> Self:
        """Return the workflow's own way.

        Args:
            settings: as train's report has them.
            batch_size: rows a step.
            is_packed: whether some row holds more than one document.
        """
        return cls(
            name="workflow",
            batch_size=batch_size,
            precision=settings["precision"],
            is_compiled=True,
            runs_ahead=True,
            loss="fused" if settings["fused_loss"] else "own",
            does_own_arithmetic=settings["arithmetic"] == "own",
            is_deterministic=settings["deterministic"],
            joins_updates=True,
            kernels=tuple(settings["kernels"]),
            checkpoint_every=checkpoint_every(settings["checkpointing"]),
            is_packed=is_packed,
            is_trimmed=False,
            workers=settings["workers"],
            prefetch_batches=settings["prefetch_batches"],
        )

    def baseline(self) -> Self:
        """Return the naive way: fp32, not compiled, waiting at each step, padded rows, loaded in line."""
        return self._replace(
            name="baseline",
            precision="fp32",
            is_compiled=False,
            runs_ahead=False,
            loss="plain",
            does_own_arithmetic=False,
            joins_updates=False,
            kernels=(),
            checkpoint_every=0,
            is_packed=False,
            is_trimmed=True,
            workers=0,
            prefetch_batches=0,
        )

    def ablations(self) -> Iterator[Self]:
        """Yield this way with one thing switched off, for each thing that it does."""
        yield self._replace(name="without compile", is_compiled=False)
        yield self._replace(name="without run-ahead", runs_ahead=False)
        loss = "fused_loss" if self.loss == "fused" else "own cross-entropy"
        yield self._replace(name=f"without {loss}", loss="plain")
        if self.does_own_arithmetic:
            yield self._replace(name="without own arithmetic", does_own_arithmetic=False)
        if self.kernels:
            yield self._replace(name="without own kernels", kernels=())
        if self.precision != "bf16":  # there the optimizer's copies of the weights are a part of it
            yield self._replace(name="without joined updates", joins_updates=False)
        if self.is_packed:
            yield self._replace(name="without packing", is_packed=False)
        yield self._replace(name="without prefetch", workers=0, prefetch_batches=0)
        if self.precision != "fp32":
            yield self._replace(name=f"without {self.precision}", precision="fp32")
        if self.checkpoint_every:
            yield self._replace(name="without checkpointing", checkpoint_every=0)


def read_job(report: Mapping[str, Any], where: str, task: str) -> tuple[Job, dict[str, Any]]:
    """Return what a train stage's report says of the job, and its settings.

    Args:
        report: of a train stage.
        where: the report's path, for the message.
        task: the stage that made it, for the message.

    Raises:
        ArtifactError: it says nothing of them.
    """
    try:
        settings = dict(report["settings"])
        named: dict[str, Any] = {name: settings[name] for name in Job._fields if name != "lora"}
        job = Job(**named, lora=settings.get("lora"))
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{where}: does not say how it was trained (settings: {error}). Run: mlxflow run {task}"
        ) from error
    return job, settings
