"""Recipes of a training step: the workflow's, the naive baseline, and ablations of the workflow's."""

from collections.abc import Iterator
from typing import NamedTuple, Self

from mlxflow.training.settings import TrainingSettings


class Recipe(NamedTuple):
    """How a training step is done.

    Attributes:
        name: "workflow", "baseline", or "without" and what is switched off.
        settings: of the training.
        is_compiled: the step is compiled with `mx.compile`.
        runs_ahead: the host builds the next step while the device computes; else it waits for each step.
        uses_mlx_loss: MLX's cross-entropy of all logits; else the loss of the settings.
        replaces_operations: some of MLX's operations are replaced, see `ops.overrides`.
        joins_updates: the optimizer updates all matrices as one array; else each by itself.
        is_packed: rows of the token file; else each piece of a document is a padded row of its own.
        is_trimmed: rows are cut to the longest of their forward pass; else padding is computed, too.
        prefetches: threads prepare batches ahead; else each is prepared when it is needed.
    """

    name: str
    settings: TrainingSettings
    is_compiled: bool
    runs_ahead: bool
    uses_mlx_loss: bool
    replaces_operations: bool
    joins_updates: bool
    is_packed: bool
    is_trimmed: bool
    prefetches: bool

    @classmethod
    def of(cls, settings: TrainingSettings, *, is_packed: bool) -> Self:
        """Return the recipe of a workflow.

        Args:
            settings: of its training.
            is_packed: whether some row holds more than one document.
        """
        return cls(
            name="workflow",
            settings=settings,
            is_compiled=True,
            runs_ahead=True,
            uses_mlx_loss=False,
            replaces_operations=True,
            joins_updates=True,
            is_packed=is_packed,
            is_trimmed=True,
            prefetches=True,
        )

    @property
    def batch_size(self) -> int:
        """Rows of a forward pass."""
        return self.settings.batch_size

    @property
    def rows_per_step(self) -> int:
        """Rows of an update."""
        return self.settings.rows_per_step

    def baseline(self) -> Self:
        """Return the naive recipe: fp32, not compiled, synchronous steps, padded rows, no prefetching."""
        return self._replace(
            name="baseline",
            settings=self.settings.replace(precision="fp32", kernels=(), checkpoint_every=0, fused_loss=False),
            is_compiled=False,
            runs_ahead=False,
            uses_mlx_loss=True,
            replaces_operations=False,
            joins_updates=False,
            is_packed=False,
            prefetches=False,
        )

    def ablations(self) -> Iterator[Self]:
        """Yield this recipe with one optimization switched off, for each one that it uses."""
        settings = self.settings
        yield self._replace(name="without compile", is_compiled=False)
        yield self._replace(name="without run-ahead", runs_ahead=False)
        loss = "fused_loss" if settings.fused_loss else "own cross-entropy"
        yield self._replace(name=f"without {loss}", uses_mlx_loss=True)
        yield self._replace(name="without own arithmetic", replaces_operations=False)
        if settings.kernels:
            yield self._replace(name="without own kernels", settings=settings.replace(kernels=()))
        if settings.precision != "bf16":  # in bf16 the joined update also holds the fp32 copies of the weights
            yield self._replace(name="without joined updates", joins_updates=False)
        if self.is_packed:
            yield self._replace(name="without packing", is_packed=False)
        else:
            yield self._replace(name="without trimming", is_trimmed=False)
        yield self._replace(name="without prefetch", prefetches=False)
        if settings.precision != "fp32":
            yield self._replace(name=f"without {settings.precision}", settings=settings.replace(precision="fp32"))
        if settings.checkpoint_every:
            yield self._replace(name="without checkpointing", settings=settings.replace(checkpoint_every=0))
