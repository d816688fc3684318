"""The quality loss from quantization: the written model compared with the dense one, whose results are cached."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn

from mlxflow.data.token_file import Rows, TokenFile
from mlxflow.device import compute_device
from mlxflow.evaluation.dense_reference import cached_reference
from mlxflow.evaluation.kl_divergence import Divergence, costs_by_layer, measure_divergence
from mlxflow.evaluation.streamed_model import StreamedModel
from mlxflow.messages.errors import StageError
from mlxflow.models import fp32_on_cpu, model_folder, quantized_layers
from mlxflow.ops import document_mask
from mlxflow.quantization.dense_model import identity_of
from mlxflow.quantization.judged_text import QuantizationTexts
from mlxflow.quantization.progress import watched_rows
from mlxflow.report.stage_reports.quantize import QualityFigures
from mlxflow.storage import atomic_folders
from mlxflow.storage.digests import digest_json
from mlxflow.storage.run_context import Context

# Rows used to rank layers by their cost once a limit is exceeded; a ranking needs few
_RANKING_ROWS = 8

# Rows in one forward pass, where the memory limit allows as many
_EVAL_BATCH = 32

# The folder of cached hidden states, beside the shards in the state folder
_KEPT_FOLDER = "evaluations"


class QualityLimits(NamedTuple):
    """The number of validation rows, and the limits of the quality loss.

    Attributes:
        max_rows: the most validation rows used, from the first.
        max_perplexity_increase: relative to the dense model; 0 for no limit.
        max_kl: mean divergence in nats per token; 0 for no limit.
    """

    max_rows: int
    max_perplexity_increase: float
    max_kl: float


def measure_quality(
    dense: Path,
    validation: TokenFile,
    *,
    layers: Mapping[str, Any],
    limits: QualityLimits,
    texts: QuantizationTexts,
    context: Context,
) -> QualityFigures:
    """Return the quality loss, measured on the written files.

    Args:
        dense: the folder of the dense model.
        validation: the tokens to compare on.
        layers: the quantized layers, by module path.
        limits: of the quality loss.
        texts: that the method learned and that judge it.
        context: of the stage, whose folder has the quantized model.

    Raises:
        StageError: a limit is exceeded (names the worst layers), or a result is not finite.
    """
    task = context.task
    model = StreamedModel(lambda: evaluated(model_folder.load(context.folder, lazy=True)[0]))
    rows = validation.rows.head(limits.max_rows)
    masks = document_mask.masks_conversations(model.model, validation, passes=model.passes)
    cache_folder = context.state / _KEPT_FOLDER
    with watched_rows(task, "measuring the dense model", rows) as watched:
        reference = cached_reference(
            lambda: _open_dense(dense),
            watched,
            folder=cache_folder,
            key=_reference_key(dense, validation.path, rows.num_rows, masks=masks, context=context),
            batch_size=_EVAL_BATCH,
            masks_documents=masks,
        )
    with watched_rows(task, "measuring the quality loss", rows) as watched:
        divergence = measure_divergence(reference, model, watched, batch_size=_EVAL_BATCH, masks_documents=masks)
    if context.digests.changed():  # an input changed during the run: the cached file may belong to another model
        atomic_folders.remove_folder(cache_folder)
    if not math.isfinite(divergence.kl):
        raise StageError(
            f"{task}: the quantized model returns numbers that are not finite on validation rows. "
            "Use more bits, or another method."
        )
    problems = list(_exceeded(limits, divergence, task))
    if problems:
        worst = _worst_layers(StreamedModel(lambda: _open_dense(dense)), model.model, layers, rows, masks=masks)
        raise StageError("\n".join(f"{problem} Costs most: {worst}." for problem in problems))
    return _figures(divergence, texts)


def _figures(divergence: Divergence, texts: QuantizationTexts) -> QualityFigures:
    return QualityFigures(
        tokens=divergence.dense.tokens,
        dense_perplexity=divergence.dense.perplexity,
        dense_perplexity_standard_error=divergence.dense.standard_error,
        perplexity=divergence.quantized.perplexity,
        perplexity_standard_error=divergence.quantized.standard_error,
        perplexity_increase=divergence.perplexity_increase,
        kl=divergence.kl,
        kl_standard_error=divergence.kl_standard_error,
        top1_agreement=divergence.top1_agreement,
        text=texts.judging,
        overlap=texts.overlap,
    )


def _reference_key(dense: Path, validation: Path, num_rows: int, *, masks: bool, context: Context) -> str:
    """Return a digest of everything that the dense model's results depend on."""
    return digest_json(
        {
            "model": identity_of(dense, context),
            "validation": context.digests.digests(validation).identity,
            "rows": num_rows,
            "masks": masks,
            "dtype": fp32_on_cpu.computed_dtype(),
            "device": [context.device, compute_device.name()],
            "versions": [context.provenance["mlx"], context.provenance["mlxflow"]],
        }
    )


def _open_dense(folder: Path) -> nn.Module:
    return evaluated(quantized_layers.made_dense(*model_folder.load(folder, lazy=True))[0])


def evaluated(model: nn.Module) -> nn.Module:
    """Return a model with lazy weights as it is evaluated, one block at a time."""
    return quantized_layers.for_evaluation(model, reads_blocks=True)


def _worst_layers(
    dense: StreamedModel, quantized: nn.Module, layers: Mapping[str, Any], rows: Rows, *, masks: bool
) -> str:
    """Return the layers with the largest quality loss when quantized alone, in words."""
    weights = quantized_layers.dense_weights(quantized, layers)
    few = rows.head(_RANKING_ROWS)
    costs = costs_by_layer(dense, weights, few, batch_size=_RANKING_ROWS, masks_documents=masks)
    return ", ".join(f"{path} ({cost:.2g} nats)" for path, cost in list(costs.items())[:3])


def _exceeded(limits: QualityLimits, divergence: Divergence, task: str) -> Iterator[str]:
    """Yield a line for each exceeded limit."""
    advice = "Give the layers that cost most more bits, or raise the limit."
    most = limits.max_perplexity_increase
    if most and not divergence.perplexity_increase <= most:
        yield (
            f"{task}.max_perplexity_increase = {most}: perplexity went from {divergence.dense.perplexity:.4g} to "
            f"{divergence.quantized.perplexity:.4g} (+{divergence.perplexity_increase:.1%}). {advice}"
        )
    if limits.max_kl and not divergence.kl <= limits.max_kl:
        yield f"{task}.max_kl = {limits.max_kl}: the divergence is {divergence.kl:.4g} nats a token. {advice}"
