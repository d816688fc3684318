"""The figures of a train stage in report.toml."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import msgspec

from mlxflow.storage.report_structs import Count, StageReport
from mlxflow.training.figures import TrainingFigures, TrainingRun
from mlxflow.training.settings import TrainingSettings

if TYPE_CHECKING:
    from mlxflow.training.job import Trained
    from mlxflow.training.model_artifact import ArtifactQuality


class TrainReport(StageReport, frozen=True, kw_only=True):
    """The figures of a train stage.

    Attributes:
        warning: the gravest about the written model, such as that it is worse than the start; None without one.
        warnings: every line that a user should know, about the written model first.
        fuse: how trained adapters were saved; None if all weights were trained.
        parameters: weights of the model in the files.
        document_mask: whether a token attended only to its own document.
        fused_loss: whether output head and loss were computed together.
        kernels: names of the fused GPU kernels in use.
        steps: see `TrainingFigures`, as are the next ones.
        last_validation_perplexity: of the model in the files.
        last_validation_perplexity_standard_error: of the same.
        gain_kept: share of the loss reduction of training, in nats, that the model in the files keeps; None without a
            reduction.
        settings: of the training.
        run: facts that may differ between two equal runs.
    """

    warning: str | None = None
    warnings: tuple[str, ...] = ()
    fuse: str | None = None
    parameters: Count
    document_mask: bool
    fused_loss: bool
    kernels: tuple[str, ...]
    steps: Count
    epochs: float | None = None
    tokens: Count
    skipped_steps: Count
    first_validation_perplexity: float
    trained_validation_perplexity: float
    best_validation_perplexity: float
    best_validation_step: Count
    last_validation_perplexity: float
    last_validation_perplexity_standard_error: float
    gain_kept: float | None = None
    settings: TrainingSettings
    run: TrainingRun

    @classmethod
    def of(
        cls, trained: "Trained", figures: TrainingFigures, quality: "ArtifactQuality", warnings: Sequence[str]
    ) -> Self:
        """Return the figures of a stage.

        Args:
            trained: the result of the training.
            figures: of the training.
            quality: of the model in the files.
            warnings: about the written model, the gravest last.
        """
        return cls(
            warning=warnings[-1] if warnings else None,
            warnings=(*reversed(warnings), *trained.warnings),
            fuse=trained.fuse or None,
            parameters=trained.parameters,
            document_mask=trained.settings.masks_documents,
            fused_loss=trained.settings.fused_loss,
            kernels=trained.settings.kernels,
            **msgspec.structs.asdict(figures),
            **quality._asdict(),
            settings=trained.settings,
            run=TrainingRun.of(trained.result, trained.kernels),
        )
