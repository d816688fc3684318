"""The work of the stage `quantize`: choose a plan, calibrate, write the model folder, measure it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxflow.data.token_file import TokenFile
from mlxflow.messages import terminal
from mlxflow.models import tokenizer_files
from mlxflow.quantization import bit_allocation, calibrated
from mlxflow.quantization import plan as plans
from mlxflow.quantization.aware_training import AwareTraining, RoundedTraining, train_rounded
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.dense_model import DenseModel, TokenPair
from mlxflow.quantization.progress import show_layers
from mlxflow.quantization.quality import QualityLimits, measure_quality
from mlxflow.quantization.settings import Setting
from mlxflow.quantization.streaming_export import Exported, export
from mlxflow.report.stage_reports.quantize import QualityFigures
from mlxflow.storage import config_json, tensor_writing
from mlxflow.storage.run_context import Context, ModelFolder, derive_seed
from mlxflow.training.model_choices import default_objective


class QuantizationRequest(NamedTuple):
    """The request for a quantization.

    Attributes:
        method: "rtn", "gptq", "awq", "dwq" or "qat".
        default: the setting of layers that no rule names.
        rules: settings by layer.
        calibration_rows: training rows that learned methods and a budget use.
        budget: under which bits are chosen; None for none.
        training: of "qat"; None for other methods.
        limits: on the cost.
        batch_size: rows in one forward pass, as far as the loss of a budget depends on it.
    """

    method: str
    default: Setting
    rules: Sequence[plans.Rule]
    calibration_rows: int
    budget: bit_allocation.BudgetRequest | None
    training: AwareTraining | None
    limits: QualityLimits
    batch_size: int


class QuantizationResult(NamedTuple):
    """The result of a quantization.

    Attributes:
        plan: of the layers.
        exported: the written model.
        budget_losses: in nats per token, of the plans tried for a budget; None without a budget.
        training: of "qat"; None for other methods.
        quality: the quality loss; None without tokens.
    """

    plan: plans.QuantizationPlan
    exported: Exported
    budget_losses: list[float] | None
    training: RoundedTraining | None
    quality: QualityFigures | None


def run_job(
    request: QuantizationRequest,
    dense: DenseModel,
    tokens: TokenPair | None,
    *,
    outputs: ModelFolder,
    metrics: Path | None,
    context: Context,
) -> QuantizationResult:
    """Quantize a model and write its folder.

    Args:
        request: method, plan and limits.
        dense: the model; changed.
        tokens: to calibrate, train and measure on; None for rounding without a measurement.
        outputs: of the folder; config and weights are written.
        metrics: gets the learning curve of "qat".
        context: of the stage.

    Raises:
        ArtifactError: a weight is not finite.
        CallError: the method does not support the plan.
        StageError: a limit of the quality loss is exceeded.
        WorkflowError: the plan does not match the model, or the budget cannot be met.
    """
    plan, losses = _choose_plan(request, dense, tokens, context)
    packed: dict[str, Packed] = {}
    trained = None
    if tokens is not None and request.training is not None and metrics is not None:
        trained = train_rounded(request.training, dense, plan.layers, tokens, metrics=metrics, context=context)
        packed = trained.packed
    elif tokens is not None and request.method != "rtn":
        rows, _ = _calibration_rows(request, tokens.train, context)
        seed = derive_seed(context.seed, "quantize.rows")
        packed = calibrated.learn(
            request.method, dense.model, plan.layers, rows.astype(mx.int32), seed=seed, key=context.task
        )
    exported = _write(request, dense, plan, packed, outputs, context)
    quality = None
    if tokens is not None:
        quality = measure_quality(
            dense.folder, tokens.validation, layers=plan.layers, limits=request.limits, context=context
        )
    return QuantizationResult(plan, exported, losses, trained, quality)


def _choose_plan(
    request: QuantizationRequest, dense: DenseModel, tokens: TokenPair | None, context: Context
) -> tuple[plans.QuantizationPlan, list[float] | None]:
    """Return the plan for a model, and the losses of the plans tried for a budget."""
    model, key = dense.model, context.task
    plan = plans.resolve(model, default=request.default, rules=request.rules, key=key)
    plans.check_supported(plan.layers, key)
    calibrated.require_learnable(request.method, model, plan.layers, key=key)
    if warning := plan.warning(key):
        terminal.say(warning)
    if request.budget is None or tokens is None:
        return plan, None
    layers, losses = bit_allocation.allocate_bits(
        model,
        plan,
        request.budget,
        _calibration_rows(request, tokens.train, context),
        rules=request.rules,
        objective=default_objective(model, tokens.train, batch_size=request.batch_size),
        batch_size=calibrated.BATCH_SIZE,
    )
    return plan._replace(layers=layers), losses


def _calibration_rows(request: QuantizationRequest, tokens: TokenFile, context: Context) -> tuple[mx.array, mx.array]:
    """Return token rows and their marks, (R, L + 1) each, chosen by seed."""
    seed = derive_seed(context.seed, "quantize.calibration")
    chosen = calibrated.choose_rows(tokens.rows.marks, count=request.calibration_rows, seed=seed)
    batch = tokens.rows.take(chosen)
    return mx.array(batch.tokens), mx.array(batch.marks)


def _write(
    request: QuantizationRequest,
    dense: DenseModel,
    plan: plans.QuantizationPlan,
    packed: dict[str, Packed],
    outputs: ModelFolder,
    context: Context,
) -> Exported:
    """Write weights, config and their companion files; `packed` is emptied meanwhile."""
    with show_layers(context.task, len(plan.layers)) as watch:
        exported = export(
            dense.model,
            plan.layers,
            file=outputs.model,
            metadata={"format": "mlx"} | tensor_writing.provenance_metadata(context.provenance),
            packed=lambda path: packed.pop(path, None),
            stored=dense.stored if request.method == "rtn" else {},
            source=str(dense.folder),
            watch=watch,
        )
    table: Mapping[str, Any] = plan.config()
    config_json.write(outputs.config, {**dense.config_json, "quantization": table, "quantization_config": table})
    tokenizer_files.copy_companions(dense.folder, context.folder)
    return exported
