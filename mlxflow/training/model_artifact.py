"""Write the model folder of a training, with adapters fused or beside it, and measure its quality.

Quality is measured on the files and compared with that of the trained model in memory.
"""

import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.evaluation.perplexity import Perplexity, measure_perplexity
from mlxflow.models import adapter_files, model_folder, quantized_layers, tokenizer_files
from mlxflow.ops.overrides import OperationOverrides, replaced_in_evaluation
from mlxflow.storage import config_json, model_files
from mlxflow.storage.run_context import Context, ModelFolder
from mlxflow.training.adapters import save_adapters
from mlxflow.training.figures import TrainingFigures
from mlxflow.training.settings import TrainingSettings
from mlxflow.training.starting_model import ModelSource, StartingModel

# A smaller kept share of the gain of training is warned about
_LEAST_KEPT = 0.95


def write_model(
    files: ModelFolder,
    context: Context,
    *,
    trained: StartingModel,
    source: ModelSource,
    tokenizer: tuple[Path, ...],
) -> nn.Module:
    """Write the model folder, with adapters saved by `source.fuse`; return the written model.

    Args:
        files: of the folder; config and weights are written.
        context: of the stage.
        trained: the model after training; changed.
        source: its origin; `fuse` is "never", "requantize" or "dense".
        tokenizer: the files to copy.
    """
    model, config = trained.model, trained.config_json
    if trained.adapter_config is not None:
        _save_adapters(model, trained.adapter_config, context, source.fuse)
        if source.fuse == "never":
            model = adapter_files.take_out(model)
        elif source.fuse == "requantize":
            model = adapter_files.fuse(model)
        else:
            model, config = quantized_layers.made_dense(model, config)
    model_folder.save(
        model=model,
        config=config,
        config_file=files.config,
        model_file=files.model,
        provenance=context.provenance,
    )
    tokenizer_files.copy_tokenizer(tokenizer, context.folder)
    if source.folder is not None:
        model_files.copy(source.folder, model_files.defaults_and_code(source.folder), context.folder)
    config_json.write_generation(context.folder, config_json.end_of_text(trained.config_json))
    return model


def _save_adapters(model: nn.Module, config: Mapping[str, Any], context: Context, fuse: str) -> None:
    folder = context.folder / model_files.adapters_folder(fuse)
    folder.mkdir(exist_ok=True)
    weights_file, config_file = (folder / name for name in model_files.ADAPTERS)
    save_adapters(model, config, weights_file=weights_file, config_file=config_file, provenance=context.provenance)


def measure_artifact(
    folder: Path, validation: Path, settings: TrainingSettings, overrides: OperationOverrides
) -> Perplexity:
    """Return the perplexity of a written model on the validation rows.

    The model is opened from the disk, so the result includes the effects of fusing, rounding and conversion.

    Args:
        folder: the model folder.
        validation: the token file.
        settings: of the training; the limit of rows, the batch size and the document mask are used.
        overrides: of the training; its products are used.

    Raises:
        ArtifactError: the files cannot be opened as a model.
    """
    gc.collect()  # frees the trained model and its optimizer, which are in reference cycles
    mx.clear_cache()
    model = model_folder.load(folder)[0]
    rows = TokenFile.open(validation).rows.head(settings.max_validation_rows)
    with replaced_in_evaluation(overrides):
        return measure_model(model, rows, batch_size=settings.batch_size, masks_documents=settings.masks_documents)


def measure_model(model: nn.Module, rows: Rows, *, batch_size: int, masks_documents: bool) -> Perplexity:
    """Return the perplexity of an opened model, quantized or not; see `measure_perplexity`."""
    model = quantized_layers.for_evaluation(model)
    return measure_perplexity(model, rows, batch_size=batch_size, masks_documents=masks_documents)


class ArtifactQuality(NamedTuple):
    """The quality of the model in the files.

    Attributes:
        last_validation_perplexity: on validation rows.
        last_validation_perplexity_standard_error: of the same.
        gain_kept: share of the loss reduction of training, in nats, that the model in the files keeps; None without a
            reduction.
    """

    last_validation_perplexity: float
    last_validation_perplexity_standard_error: float
    gain_kept: float | None


def quality_of(figures: TrainingFigures, measured: Perplexity) -> ArtifactQuality:
    """Return the artifact's quality for the report.

    Args:
        figures: of the training.
        measured: of `measure_artifact`.
    """
    before, trained = math.log(figures.first_validation_perplexity), math.log(figures.trained_validation_perplexity)
    gain_kept = (before - measured.loss) / (before - trained) if before > trained else None
    return ArtifactQuality(measured.perplexity, measured.standard_error, gain_kept)


def warn_of_loss(figures: TrainingFigures, quality: ArtifactQuality, *, fuse: str, task: str) -> str | None:
    """Return a warning if the artifact is clearly worse than the trained model, else None.

    Args:
        figures: of the training.
        quality: of the artifact.
        fuse: how trained adapters were saved; "" if all weights were trained.
        task: the stage's name.
    """
    gain_kept = quality.gain_kept
    if gain_kept is None or gain_kept >= _LEAST_KEPT:
        return None
    is_fused = fuse not in ("", "never")
    about = f'{task}.fuse = "{fuse}"' if is_fused else task
    advice = f' {task}.fuse = "never" keeps all of it.' if is_fused else ""
    first, trained = figures.first_validation_perplexity, figures.trained_validation_perplexity
    last = quality.last_validation_perplexity
    how = (
        f"the artifact keeps {gain_kept:.0%} of what training gained"
        if gain_kept > 0
        else "the artifact lost what was gained"
    )
    return f"{about}: {how}: perplexity {first:.4g} before, {trained:.4g} trained, {last:.4g} in the files.{advice}"
