"""The figures of a training run in the reports of train and quantize."""

from typing import TYPE_CHECKING, Self

from mlxflow.storage.report_structs import Count, ReportTable, Seconds

if TYPE_CHECKING:
    from mlxflow.kernels.model_kernels import ModelKernels
    from mlxflow.training.run_state import Result


class TrainingRun(ReportTable, frozen=True, kw_only=True):
    """The table `run` of a stage that trains: its own keys.

    Attributes:
        tokens_per_second: tokens learned from by all ranks, per second of training.
        training_seconds: wall clock of all steps, data included.
        compile_seconds: extra time of first steps over later ones.
        data_wait_seconds: time that steps waited for batches.
        device_wait_seconds: time that the host waited for the device.
        rank_waited_seconds: how long each rank waited for the others since its last start; empty for one process.
        training_peak_memory_bytes: most memory that MLX's arrays held in training.
        training_memory_limit_bytes: the memory limit of the run; None in reports of earlier versions.
        kernels_refused: `name: reason` of each fused kernel that is not in use.
    """

    tokens_per_second: float
    training_seconds: Seconds
    compile_seconds: Seconds
    data_wait_seconds: Seconds
    device_wait_seconds: Seconds
    rank_waited_seconds: tuple[Seconds, ...] = ()
    training_peak_memory_bytes: Count
    training_memory_limit_bytes: Count | None = None
    kernels_refused: tuple[str, ...]

    @classmethod
    def of(cls, result: "Result", kernels: "ModelKernels") -> Self:
        """Return the keys of a training run.

        Args:
            result: of `training.run.train`.
            kernels: in use.
        """
        return cls(
            tokens_per_second=result.tokens_per_second,
            training_seconds=result.seconds,
            compile_seconds=result.compile_seconds,
            data_wait_seconds=result.data_wait_seconds,
            device_wait_seconds=result.device_wait_seconds,
            rank_waited_seconds=result.rank_waited_seconds,
            training_peak_memory_bytes=result.peak_memory_bytes,
            training_memory_limit_bytes=result.memory_limit_bytes,
            kernels_refused=tuple(f"{name}: {reason}" for name, reason in kernels.refused.items()),
        )


class TrainingFigures(ReportTable, frozen=True, kw_only=True):
    """The results of a training run; perplexities are those of the model in memory.

    Attributes:
        steps: optimizer updates.
        epochs: passes over the training rows; None in reports of earlier versions.
        tokens: learned from.
        skipped_steps: without a finite loss and gradient.
        first_validation_perplexity: before the first step.
        trained_validation_perplexity: of the weights that are kept.
        best_validation_perplexity: the lowest of all validations.
        best_validation_step: after which it was measured.
    """

    steps: Count
    epochs: float | None = None
    tokens: Count
    skipped_steps: Count
    first_validation_perplexity: float
    trained_validation_perplexity: float
    best_validation_perplexity: float
    best_validation_step: Count

    @classmethod
    def of(cls, result: "Result", *, num_rows: int, keeps_best: bool) -> Self:
        """Return the figures of a training run.

        Args:
            result: of `training.run.train`.
            num_rows: of the training file.
            keeps_best: whether the trained model has the weights of the best validation; else of the last.
        """
        from mlxflow.evaluation.perplexity import perplexity_of

        kept_loss = result.best_validation_loss if keeps_best else result.last_validation_loss
        return cls(
            steps=result.steps,
            epochs=result.rows / num_rows,
            tokens=result.tokens,
            skipped_steps=result.skipped_steps,
            first_validation_perplexity=perplexity_of(result.first_validation_loss),
            trained_validation_perplexity=perplexity_of(kept_loss),
            best_validation_perplexity=perplexity_of(result.best_validation_loss),
            best_validation_step=result.best_step,
        )
