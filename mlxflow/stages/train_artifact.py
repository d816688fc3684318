"""What training leaves in its folder: the model with its adapters fused or beside it, and how good that is.

Quality is measured on the files and held against that of the model that was trained.
"""

import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxflow.storage.model_files import ADAPTERS, ADDED_ADAPTERS
from mlxflow.workflow.stage import Context

if TYPE_CHECKING:
    from mlxflow.stages.train import Config, Inputs, Outputs

# Of what training gained: less than this is worth a warning
_LEAST_KEPT = 0.95


def adapters_folder(fuse: str) -> Path:
    """Return where adapters lie in the artifact: beside the model, or apart where they were added into its weights."""
    return Path() if fuse == "never" else Path(ADDED_ADAPTERS)


def write_model(
    outputs: "Outputs",
    context: Context,
    *,
    model: Any,
    config_json: Mapping[str, Any],
    adapter_config: Mapping[str, Any] | None,
    fuse: str,
) -> Any:
    """Write the model folder, adapters as `fuse` says; return the model whose weights are in `model.safetensors`.

    Args:
        outputs: of them the config and the weights.
        context: of the stage.
        model: as it was trained; changed.
        config_json: its `config.json`.
        adapter_config: the `adapter_config.json`, where adapters were trained.
        fuse: what becomes of them; decided.
    """
    from mlxflow.models import adapter_files, model_folder, quantized_layers
    from mlxflow.training.adapters import save_adapters

    if adapter_config is not None:
        folder = context.folder / adapters_folder(fuse)
        folder.mkdir(exist_ok=True)
        weights_file, config_file = (folder / name for name in ADAPTERS)
        save_adapters(
            model,
            adapter_config,
            weights_file=weights_file,
            config_file=config_file,
            provenance=context.provenance,
        )
        if fuse == "never":
            model = adapter_files.take_out(model)
        elif fuse == "requantize":
            model = adapter_files.fuse(model)
        else:
            model, config_json = quantized_layers.made_dense(model, config_json)
    model_folder.save(
        model=model,
        config=config_json,
        config_file=outputs.config,
        model_file=outputs.model,
        provenance=context.provenance,
    )
    return model


def measure_artifact(config: "Config", inputs: "Inputs", context: Context, *, masks: bool) -> Any:
    """Return the perplexity of the model in the stage's folder on the validation rows.

    Whatever lies between the trained model and the files (fusing, rounding, another dtype) is part of the result: the
    model is opened from the disk.

    Args:
        config: the table; its limit of validation rows and its batch size hold here too.
        inputs: of them the validation tokens.
        context: of the stage; its folder holds the written model.
        masks: whether no token attends to another document in its row.

    Raises:
        ArtifactError: the files cannot be opened as a model.
    """
    import mlx.core as mx

    from mlxflow.data.token_file import TokenFile
    from mlxflow.evaluation.perplexity import measure_perplexity
    from mlxflow.models import model_folder, quantized_layers

    gc.collect()  # the trained model and its optimizer are in reference cycles
    mx.clear_cache()
    model = quantized_layers.for_evaluation(model_folder.load(context.folder)[0])
    rows = TokenFile.open(inputs.validation).rows.head(config.max_validation_rows)
    return measure_perplexity(model, rows, batch_size=config.batch_size, masks_documents=masks)


def quality_of(report: Mapping[str, Any], measured: Any) -> dict[str, Any]:
    """Return the artifact's quality for the report.

    Args:
        report: with the perplexities before training and of the trained model, as `training.run.report_of` returns it.
        measured: of `measure_artifact`.

    Returns:
        `last_validation_perplexity` with its standard error, and `gain_kept`: of the loss in nats by which training
        made the model better, the share that the artifact has. It is left out where training made nothing better.
    """
    before, trained = (math.log(report[f"{which}_validation_perplexity"]) for which in ("first", "trained"))
    quality = {
        "last_validation_perplexity": measured.perplexity,
        "last_validation_perplexity_standard_error": measured.standard_error,
    }
    if before > trained:
        quality["gain_kept"] = (before - measured.loss) / (before - trained)
    return quality


def warn_of_loss(report: Mapping[str, Any], task: str) -> str | None:
    """Return a line for the terminal where the artifact is clearly worse than the trained model; None otherwise.

    Args:
        report: with the artifact's quality.
        task: the stage's name.
    """
    kept = report.get("gain_kept", 1.0)
    if kept >= _LEAST_KEPT:
        return None
    is_fused = report.get("fuse", "never") != "never"
    about = f'{task}.fuse = "{report["fuse"]}"' if is_fused else task
    advice = f' {task}.fuse = "never" keeps all of it.' if is_fused else ""
    first, trained, last = (report[f"{which}_validation_perplexity"] for which in ("first", "trained", "last"))
    how = f"the artifact keeps {kept:.0%} of what training gained" if kept > 0 else "the artifact lost what was gained"
    return f"{about}: {how}: perplexity {first:.4g} before, {trained:.4g} trained, {last:.4g} in the files.{advice}"
