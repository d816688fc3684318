"""What quantization costs: the written model against the dense one, whose side is computed once for all variants."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxflow.errors import StageError
from mlxflow.workflow.stage import Context

# Rows on which single layers are blamed when a gate closes: a rank among them needs few
_BLAMING_ROWS = 8

# Rows in one forward pass, where the memory limit allows as many
_EVAL_BATCH = 32

# Beside the shards in the folder for what is remembered between runs
_KEPT_FOLDER = "evaluations"


def measure(
    config: Any, validation: Any, folder: Path, *, layers: Mapping[str, Any], context: Context
) -> dict[str, Any]:
    """Return what quantization costs, measured on the files.

    Args:
        config: a `[quantize]` table.
        validation: the token file.
        folder: of the dense model.
        layers: those that were quantized, by module path.
        context: of the stage, whose folder has the quantized model.

    Raises:
        StageError: more than a gate allows, and the layers that cost most are named; numbers that are not finite.
    """
    from mlxflow.evaluation.dense_reference import kept_reference
    from mlxflow.evaluation.kl_divergence import measure_divergence
    from mlxflow.models import model_folder, quantized_layers
    from mlxflow.ops import document_mask
    from mlxflow.storage import atomic_folders

    def load_dense() -> Any:
        return quantized_layers.for_evaluation(quantized_layers.made_dense(*model_folder.load(folder, lazy=True))[0])

    quantized = quantized_layers.for_evaluation(model_folder.load(context.folder)[0])
    rows = validation.rows.head(config.max_validation_rows)
    masks = validation.has_conversations and document_mask.can_mask_documents(quantized, validation.vocab_size)
    reference = kept_reference(
        load_dense,
        rows,
        folder=context.state / _KEPT_FOLDER,
        key=_key(folder, validation.path, rows.num_rows, masks=masks, context=context),
        batch_size=_EVAL_BATCH,
        masks_documents=masks,
    )
    found = measure_divergence(reference, quantized, rows, batch_size=_EVAL_BATCH, masks_documents=masks)
    if context.digests.changed():  # what is kept may be of another model than its name says
        atomic_folders.remove_folder(context.state / _KEPT_FOLDER)
    if not math.isfinite(found.kl):
        raise StageError(
            f"{context.task}: the quantized model returns numbers that are not finite on validation rows. "
            "Use more bits, or another method."
        )
    problems = list(_closed_gates(config, found, context.task))
    if problems:
        worst = _worst_layers(folder, quantized, layers, rows, masks=masks)
        raise StageError("\n".join(f"{problem} Costs most: {worst}." for problem in problems))
    return {
        "tokens": found.dense.tokens,
        "dense_perplexity": found.dense.perplexity,
        "dense_perplexity_standard_error": found.dense.standard_error,
        "perplexity": found.quantized.perplexity,
        "perplexity_standard_error": found.quantized.standard_error,
        "perplexity_increase": found.perplexity_increase,
        "kl": found.kl,
        "kl_standard_error": found.kl_standard_error,
        "top1_agreement": found.top1_agreement,
    }


def _key(folder: Path, validation: Path, num_rows: int, *, masks: bool, context: Context) -> str:
    """Return a name for all that the dense side of a comparison follows from."""
    from mlxflow.device import compute_device
    from mlxflow.storage import model_files
    from mlxflow.storage.digests import digest_json

    files = [folder / name for name in model_files.find(folder).read]
    return digest_json(
        {
            "model": {file.relative_to(folder).as_posix(): context.digests.digests(file).identity for file in files},
            "validation": context.digests.digests(validation).identity,
            "rows": num_rows,
            "masks": masks,
            "device": [context.device, compute_device.name()],
            "versions": [context.provenance["mlx"], context.provenance["mlxflow"]],
        }
    )


def _worst_layers(folder: Path, quantized: Any, layers: Mapping[str, Any], rows: Any, *, masks: bool) -> str:
    """Return the layers whose quantized weights cost most alone, in words."""
    from mlxflow.evaluation.kl_divergence import costs_by_layer
    from mlxflow.models import model_folder, quantized_layers

    dense = quantized_layers.for_evaluation(quantized_layers.made_dense(*model_folder.load(folder))[0])
    weights = quantized_layers.dense_weights(quantized, layers)
    few = rows.head(_BLAMING_ROWS)
    costs = costs_by_layer(dense, weights, few, batch_size=_BLAMING_ROWS, masks_documents=masks)
    return ", ".join(f"{path} ({cost:.2g} nats)" for path, cost in list(costs.items())[:3])


def _closed_gates(config: Any, found: Any, task: str) -> Iterator[str]:
    """Yield a line for each gate that the costs are over."""
    advice = "Give the layers that cost most more bits, or raise the limit."
    gate = config.max_perplexity_increase
    if gate and not found.perplexity_increase <= gate:
        yield (
            f"{task}.max_perplexity_increase = {gate}: perplexity went from {found.dense.perplexity:.4g} to "
            f"{found.quantized.perplexity:.4g} (+{found.perplexity_increase:.1%}). {advice}"
        )
    if config.max_kl and not found.kl <= config.max_kl:
        yield f"{task}.max_kl = {config.max_kl}: the divergence is {found.kl:.4g} nats a token. {advice}"
