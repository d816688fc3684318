"""The work of the stage `quantize`: choose a plan, calibrate, write the model folder, measure it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxflow.data.token_file import TokenFile
from mlxflow.messages import terminal
from mlxflow.models import model_folder, tokenizer_files
from mlxflow.quantization import plan as plans
from mlxflow.quantization.aware_training import RoundedTraining, train_rounded
from mlxflow.quantization.block_method import BlockErrors
from mlxflow.quantization.codec import Packed
from mlxflow.quantization.dense_model import DenseModel, TokenPair
from mlxflow.quantization.judged_text import QuantizationTexts, describe_texts, text_warnings
from mlxflow.quantization.learning import calibration_rows, learn_layers
from mlxflow.quantization.plan_choice import choose
from mlxflow.quantization.progress import show_layers
from mlxflow.quantization.quality import evaluated, measure_quality
from mlxflow.quantization.quantization_request import QuantizationRequest
from mlxflow.quantization.rounding_check import CHECKED_ROWS, check_rounding
from mlxflow.quantization.scale_tuning import TunedScales
from mlxflow.quantization.streaming_export import Exported, export
from mlxflow.quantization.work_forecast import announced
from mlxflow.report.stage_reports.quantize import BudgetFigures, QualityFigures, RotationFigures, TeacherFigures
from mlxflow.storage import config_json, tensor_writing
from mlxflow.storage.host_arrays import numpy_of
from mlxflow.storage.run_context import Context, ModelFolder


class QuantizationResult(NamedTuple):
    """The result of a quantization.

    Attributes:
        plan: of the layers.
        exported: the written model.
        budget: the plans that were measured for a budget; None without a budget.
        training: of "qat"; None for other methods.
        blocks: errors of the blocks, of "block"; empty for other methods.
        tuned: scales of the whole model, of "block"; None without.
        start: the stage whose codes and grids the training started from; None without.
        rotation: that was tried; None without.
        teacher: the cached distributions that were distilled; None without.
        texts: that the method learned and that judged it; None without tokens.
        quality: the quality loss; None without tokens.
        warnings: about figures that flatter the method.
    """

    plan: plans.QuantizationPlan
    exported: Exported
    budget: BudgetFigures | None
    training: RoundedTraining | None
    blocks: list[BlockErrors]
    tuned: TunedScales | None
    start: str | None
    rotation: RotationFigures | None
    teacher: TeacherFigures | None
    texts: QuantizationTexts | None
    quality: QualityFigures | None
    warnings: list[str]


def run_job(
    request: QuantizationRequest,
    dense: DenseModel,
    tokens: TokenPair | None,
    *,
    outputs: ModelFolder,
    metrics: Path | None,
    context: Context,
) -> QuantizationResult:
    """Say what a quantization will take, do it, and write its folder; see `_run`."""
    with announced(request, dense, tokens, context):
        return _run(request, dense, tokens, outputs=outputs, metrics=metrics, context=context)


def _run(
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
    dense, plan, learned, figures, start, rotation = choose(request, dense, tokens, context)
    packed: dict[str, Packed] = {}
    trained, tuned, teacher = None, None, None
    blocks: list[BlockErrors] = []
    if tokens is not None and request.training is not None and metrics is not None:
        trained = train_rounded(request.training, dense, plan.layers, tokens, start, metrics=metrics, context=context)
        packed, teacher = trained.packed, trained.teacher
    elif tokens is not None:
        learned = learned or learn_layers(request, dense, plan.layers, tokens.train, context)
        packed, blocks, tuned, teacher = learned
    exported = _write(request, dense, plan, packed, outputs, context)
    name = request.start and request.start.name
    if tokens is None:
        return QuantizationResult(plan, exported, figures, trained, blocks, tuned, name, None, None, None, None, [])
    texts = _texts(request, tokens, context)
    quality = measure_quality(
        dense.folder, tokens.validation, layers=plan.layers, limits=request.limits, texts=texts, context=context
    )
    warnings = [
        *_losses_of_rounding(request, dense, plan, tokens, context),
        *_warnings(request, tokens, texts, quality, context),
    ]
    for warning in warnings:
        terminal.say(warning)
    return QuantizationResult(
        plan, exported, figures, trained, blocks, tuned, name, rotation, teacher, texts, quality, warnings
    )


def _warnings(
    request: QuantizationRequest,
    tokens: TokenPair,
    texts: QuantizationTexts,
    quality: QualityFigures,
    context: Context,
) -> Iterator[str]:
    """Yield warnings about figures that flatter a method, and about too little text."""
    learns_text = request.training is not None and not request.training.distills
    task = context.task
    yield from text_warnings(texts, task=task, perplexity_increase=quality.perplexity_increase, learns_text=learns_text)
    yield from _shortage(request, tokens.train, context)


def _losses_of_rounding(
    request: QuantizationRequest,
    dense: DenseModel,
    plan: plans.QuantizationPlan,
    tokens: TokenPair,
    context: Context,
) -> Iterator[str]:
    """Yield a warning if the written model is worse than the same plan by rounding, which the method began with."""
    if request.method == "rtn":
        return
    by_text = request.training is not None and not request.training.distills
    rows = tokens.validation.rows.head(request.limits.max_rows)
    found = check_rounding(
        dense._replace(rotation=None).reopened,
        lambda: evaluated(model_folder.load(context.folder, lazy=True)[0]),
        plan.layers,
        rows,
        folder=context.unfinished / "rounding",
        by_text=by_text,
    )
    if found.is_worse:
        what = "loss on the text" if by_text else "divergence from the dense model"
        yield (
            f"{context.task}: {request.method} is worse than rounding to nearest: its {what} is {found.learned:.4g} "
            f"nats, that of rounding {found.rounded:.4g} ({min(rows.num_rows, CHECKED_ROWS)} validation rows). "
            f'Set {context.task}.method = "rtn", or calibrate on more text of this kind.'
        )


def _shortage(request: QuantizationRequest, tokens: TokenFile, context: Context) -> Iterator[str]:
    """Yield a warning if there are fewer calibration rows than requested."""
    uses = request.budget is not None or request.rotations or request.method not in ("rtn", "qat")
    if not uses:
        return
    ids, _ = calibration_rows(request, tokens, context)
    if len(ids) < request.calibration_rows:
        rows = "row" if len(ids) == 1 else "rows"
        yield (
            f"{context.task}.calibration_rows = {request.calibration_rows}: the training text of {request.token_stage} "
            f"fills {len(ids)} {rows} of {ids.shape[1] - 1} tokens, and the method learned these. Add text to its "
            "sources, or lower the number."
        )


def _texts(request: QuantizationRequest, tokens: TokenPair, context: Context) -> QuantizationTexts:
    """Return the names of the texts that the method learned and that judge it."""
    learned = None
    if request.training is not None:
        learned = tokens.train.rows.tokens
    elif request.method != "rtn" or request.budget is not None or request.rotations:
        learned = numpy_of(calibration_rows(request, tokens.train, context)[0])
    judging = tokens.validation.rows.head(request.limits.max_rows)
    return describe_texts(learned, tokens.train, judging, stage=request.token_stage)


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
            stored=dense.stored if request.method != "awq" and request.training is None else {},
            source=str(dense.folder),
            watch=watch,
        )
    table: Mapping[str, Any] = plan.config()
    config_json.write(outputs.config, {**dense.config_json, "quantization": table, "quantization_config": table})
    tokenizer_files.copy_companions(dense.folder, context.folder)
    return exported
